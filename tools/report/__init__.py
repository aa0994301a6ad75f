"""`python -m tools.report`: one page of HTML about a trained run."""
