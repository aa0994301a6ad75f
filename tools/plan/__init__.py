"""What a pretraining would take on given accelerators: memory, communication, days; `python -m tools.plan`."""
