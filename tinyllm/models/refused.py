"""Architectures that are known and not run: each with its reason, and what would be needed."""

IMAGES = "it reads images; we run text only"
SOUND = "it writes sound; we run text only"
DIFFUSION = "it fills in text by diffusion, not word by word: needs a loop over masked tokens"
DRAFTER = "it guesses ahead for another model; we run whole models: needs that model's activations"

NOT_RUN = {
    **dict.fromkeys("chameleon cogvlm paddleocr hunyuan_vl deepseek2-ocr clip".split(), IMAGES),
    **dict.fromkeys("wavtokenizer-dec qwen3tts pockettts".split(), SOUND),
    **dict.fromkeys("llada llada-moe dream rnd1".split(), DIFFUSION),
    **dict.fromkeys("eagle3 dflash gemma4-assistant".split(), DRAFTER),
    "clef": "it decides between candidates instead of writing: needs a head of its own",
    "graniteswitch": "it switches adapters by token: needs adapters within a layer",
    **dict.fromkeys(
        "bailingmoe3 kimi-k3 glm5-next minimax-01".split(),
        "linear attention of another make beside plain: needs a mixer of its own",
    ),
    **dict.fromkeys(
        "deepseek4 minimax-m3 qwen4exp hy_v4".split(),
        "sparse attention and other parts of its own: needs choosing positions on every backend",
    ),
    **dict.fromkeys(
        "hy_v3 maple muse-glimmer spark2_5 talkie".split(),
        "it has no row of our table yet: needs one, with a reference to prove it",
    ),
}
