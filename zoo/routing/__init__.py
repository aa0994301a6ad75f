"""Routing: how some of a block's tokens are chosen, in one vocabulary for experts, depth and adapted layers."""
