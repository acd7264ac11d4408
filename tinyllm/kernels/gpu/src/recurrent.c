/* Layers that carry a state from one token to the next. `states` holds the slots of all sequences, `slots` says
   which one is whose, and `offset` where this layer's array begins in a slot, all counted in floats. Sequences are
   GROUP_ID(1); their rows are walked in order. */
#define STATE_ARGS                                                                                              \
    GLOBAL float *states, GLOBAL const int *slots, GLOBAL const int *starts, const ulong slot_size, const ulong offset
#define STATE (states + (ulong)slots[GROUP_ID(1)] * slot_size + offset)
#define ROWS_OF_SEQUENCE (int t = starts[GROUP_ID(1)]; t < starts[GROUP_ID(1) + 1]; ++t)

/* Causal depthwise convolution; x [T, n], w [n, width], the state [width - 1, n]. A thread for each channel. */
KERNEL void conv1d(GLOBAL const float* x, GLOBAL const float* w, GLOBAL const float* bias, GLOBAL float* y, STATE_ARGS,
                   const int n, const int width) {
    const int c = GLOBAL_ID(0), start = starts[GROUP_ID(1)];
    if (c >= n) return;
    GLOBAL float* kept = STATE;
    for ROWS_OF_SEQUENCE {
        float sum = bias ? bias[c] : 0.0f;
        for (int i = 0; i < width; ++i) {
            const int r = t - start - (width - 1) + i; /* row within the sequence; before it: the state */
            sum += w[c * width + i] * (r >= 0 ? x[(ulong)(start + r) * n + c] : kept[(r + width - 1) * n + c]);
        }
        y[(ulong)t * n + c] = sum;
    }
    const int rows = starts[GROUP_ID(1) + 1] - start;
    for (int i = 0; i < width - 1; ++i) { /* in ascending order: what is read lies above what is written */
        const int r = rows - (width - 1) + i;
        kept[i * n + c] = r >= 0 ? x[(ulong)(start + r) * n + c] : kept[(r + width - 1) * n + c];
    }
}

/* h = exp(dt a) h + dt x b; y = h c + d x. A thread for each channel; SIZE values of h in registers. N_DECAY is
   SIZE, or 1 where a channel decays as one; N_GROUP groups of channels have a b and c each. */
#ifndef N_GROUP
#define N_GROUP 1
#define N_DECAY SIZE
#endif
KERNEL void scan(GLOBAL const float* x, GLOBAL const float* dt, GLOBAL const float* a, GLOBAL const float* b,
                 GLOBAL const float* c, GLOBAL const float* d, GLOBAL float* y, STATE_ARGS, const int n) {
    const int i = GLOBAL_ID(0);
    if (i >= n) return;
    GLOBAL float* state = STATE + (ulong)i * SIZE;
    float h[SIZE], decay[SIZE];
    for (int s = 0; s < SIZE; ++s) {
        h[s] = state[s];
        decay[s] = a[(ulong)i * N_DECAY + (N_DECAY > 1 ? s : 0)];
    }
    for ROWS_OF_SEQUENCE {
        const float step = dt[(ulong)t * n + i], in = x[(ulong)t * n + i];
        const ulong row = ((ulong)t * N_GROUP + (ulong)i * N_GROUP / n) * SIZE;
        float sum = 0.0f;
        for (int s = 0; s < SIZE; ++s) {
            h[s] = exp(step * decay[s]) * h[s] + step * in * b[row + s];
            sum += h[s] * c[row + s];
        }
        y[(ulong)t * n + i] = sum + d[i] * in;
    }
    for (int s = 0; s < SIZE; ++s) state[s] = h[s];
}

/* Row t becomes the row before it; the last one is kept. */
KERNEL void shift_rows(GLOBAL const float* x, GLOBAL float* y, STATE_ARGS, const int n) {
    const int c = GLOBAL_ID(0);
    if (c >= n) return;
    float before = STATE[c];
    for ROWS_OF_SEQUENCE {
        const float here = x[(ulong)t * n + c];
        y[(ulong)t * n + c] = before;
        before = here;
    }
    STATE[c] = before;
}

/* RWKV-6: y = r (S + diag(u) k^T v); S = diag(w) S + k^T v. A group of SIZE threads for each head, a thread for
   each column of S. */
KERNEL void wkv6(GLOBAL const float* r, GLOBAL const float* k, GLOBAL const float* v, GLOBAL const float* w,
                 GLOBAL const float* u, GLOBAL float* y, STATE_ARGS, const int n) {
    const int head = GROUP_ID(0), j = LOCAL_ID(0);
    GLOBAL float* state = STATE + (ulong)head * SIZE * SIZE + j;
    float s[SIZE];
    for (int i = 0; i < SIZE; ++i) s[i] = state[i * SIZE];
    for ROWS_OF_SEQUENCE {
        const ulong at = (ulong)t * n + (ulong)(head * SIZE);
        const float value = v[at + j];
        float sum = 0.0f;
        for (int i = 0; i < SIZE; ++i) {
            const float kv = k[at + i] * value;
            sum += r[at + i] * (s[i] + u[head * SIZE + i] * kv);
            s[i] = w[at + i] * s[i] + kv;
        }
        y[at + j] = sum;
    }
    for (int i = 0; i < SIZE; ++i) state[i * SIZE] = s[i];
}

/* RWKV-7: S = S diag(w) + (S a) b^T + v k^T; y = S r. A thread for each row of S. */
KERNEL void wkv7(GLOBAL const float* r, GLOBAL const float* w, GLOBAL const float* k, GLOBAL const float* v,
                 GLOBAL const float* a, GLOBAL const float* b, GLOBAL float* y, STATE_ARGS, const int n) {
    const int head = GROUP_ID(0), i = LOCAL_ID(0);
    GLOBAL float* state = STATE + ((ulong)head * SIZE + i) * SIZE;
    float s[SIZE];
    for (int j = 0; j < SIZE; ++j) s[j] = state[j];
    for ROWS_OF_SEQUENCE {
        const ulong at = (ulong)t * n + (ulong)(head * SIZE);
        float removed = 0.0f, sum = 0.0f;
        for (int j = 0; j < SIZE; ++j) removed += s[j] * a[at + j];
        for (int j = 0; j < SIZE; ++j) {
            s[j] = s[j] * w[at + j] + removed * b[at + j] + v[at + i] * k[at + j];
            sum += s[j] * r[at + j];
        }
        y[at + i] = sum;
    }
    for (int j = 0; j < SIZE; ++j) state[j] = s[j];
}
