"""The mathematics of language models, written once on a Backend.

Read in this order: ``archs`` (what distinguishes one architecture from another), ``config`` (what a file's
keys say), ``decoder`` (one pass), ``attention``, ``ffn``, ``rope``; the other mixers stand beside them.

Shape letters in comments: T rows of this step, S stored positions, H query heads, K key/value heads,
D head_dim, E n_embd, F n_ff, V n_vocab.
"""
