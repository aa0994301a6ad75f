"""Routing in one vocabulary, for experts, Mixture-of-Depths and adapted layers alike. Five words, each a file:

- **pool**: the tokens that compete with each other, such as the image tokens of a row;
- **candidates**: the members of pools, with what a router may know about them;
- **scorer**: gives every candidate a score for each output (an expert, or the one layer that may be skipped);
- **chooser**: turns scores into a selection: each expert's top-k, each token's top-k, or what is above a threshold;
- **selection**: who was taken, with the counts as the host knows them.

A *router* is a scorer with its chooser. Who uses a plain scorer chooses for it, by expert choice.
"""
