"""Sweeps over pretrainings: arms × sizes × seeds, what each saves of the dense model's training; `type: pretrain`."""
