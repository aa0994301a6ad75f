"""`python -m tools.evaluate`: what a trained run can do, on any data that the project reads."""
