"""What a recipe assembles, on the screen and as a page; see `pretrain.describe` for the figures themselves."""
