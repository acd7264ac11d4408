"""Compile a model's kernels ahead of its use, by running every kind of step that it takes."""

from __future__ import annotations

from ..model import Model

PROMPTS = (1, 2, 3, 5, 8, 33)  # tokens: kernels differ for one, a few, many
CHOICES = 40  # the sampler's default top_k
BEHIND = 4  # room for so many tokens after each prompt


def warm_up(model: Model) -> None:
    """Read prompts of several lengths and continue them, one and two at a time; an encoder embeds them."""
    prompts = [[0] * n for n in PROMPTS]
    if not model.config.causal:
        model.network.hidden(prompts)
        return
    net = model.network
    read = None if net.reader is None else prompts[-1]
    for ids in prompts:
        states = [model.new_state(len(ids) + BEHIND, source=read) for _ in range(2)]
        for state in states:
            state.append(ids)
            net.forward([(state, len(ids), "last")])
        for together in (states[:1], states):
            for state in together:
                state.append([0])
            net.forward([(state, 1, "all") for state in together])
    state = model.new_state(max(PROMPTS), source=read)
    state.append(prompts[-1])
    logits = net.forward([(state, len(prompts[-1]), "all")])[0]
    net.be.top_k(logits[-1], min(CHOICES, net.n_vocab))
