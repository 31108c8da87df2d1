"""The network: backbones, levels, encoding, prior, heads, losses and checkpoints.

Nothing here reads a data set or trains; weights of both earlier implementations are read here.
"""
