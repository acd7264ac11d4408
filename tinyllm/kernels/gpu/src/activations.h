/* The activation functions. */
INLINE float sigmoid(const float x) {
    return 0.5f + 0.5f * tanh(0.5f * x);
}

/* kind: the place of the name in ACTIVATIONS of common.py. */
INLINE float activate(const float x, const int kind) {
    switch (kind) {
        case 0: return x * sigmoid(x);
        case 1: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
        case 2: return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case 3: return fmax(x, 0.0f);
        case 4: return x > 0.0f ? x * x : 0.0f;
        case 5: return sigmoid(x);
        case 6: return tanh(x);
        case 7: return exp(x);
        default: return fmax(x, 0.0f) + log1p(exp(-fabs(x)));
    }
}

/* act(gate) * up; kind 9 is swiglu_oai. */
INLINE float gated(const float gate, const float up, const int kind) {
    if (kind != 9) return activate(gate, kind) * up;
    const float g = fmin(gate, 7.0f), u = fmin(fmax(up, -7.0f), 7.0f);
    return g * sigmoid(1.702f * g) * (u + 1.0f);
}
