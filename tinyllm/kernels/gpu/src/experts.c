/* Mixtures of experts: which ones, which rows go to each, and the weighted sum. */
#define THREADS 64
#define MAX_EXPERTS 1024
#define LOWEST (-3.0e38f)

/* The largest of score[0 .. n), the lower index among equals, in every thread. */
INLINE int largest(SHARED const float* score, const int n, SHARED float* best, SHARED int* where) {
    const int tid = LOCAL_ID(0);
    float v = LOWEST;
    int at = n;
    for (int i = tid; i < n; i += THREADS)
        if (score[i] > v) {
            v = score[i];
            at = i;
        }
    best[tid] = v;
    where[tid] = at;
    for (int o = THREADS / 2; o > 0; o >>= 1) {
        BARRIER();
        if (tid < o && (best[tid + o] > best[tid] || (best[tid + o] == best[tid] && where[tid + o] < where[tid]))) {
            best[tid] = best[tid + o];
            where[tid] = where[tid + o];
        }
    }
    BARRIER();
    const int found = where[0] < n ? where[0] : n - 1; /* n where no score is a number */
    BARRIER();
    return found;
}

/* One row of logits [n] -> k experts and their weights; gating 0 softmax, 1 sigmoid, 2 softmax of the chosen. */
KERNEL void route(GLOBAL const float* logits, GLOBAL const float* bias, GLOBAL int* experts, GLOBAL float* weights,
                  const int n, const int k, const int gating, const int renormalise, const float scale,
                  const int n_group, const int n_group_used) {
    LOCAL float score[MAX_EXPERTS];
    LOCAL float choice[MAX_EXPERTS];
    LOCAL float group[MAX_EXPERTS];
    LOCAL float best[THREADS];
    LOCAL int where[THREADS];
    const int tid = LOCAL_ID(0);
    const ulong row = (ulong)GROUP_ID(0);
    for (int i = tid; i < n; i += THREADS) score[i] = logits[row * n + i];
    BARRIER();
    /* No barrier stands in a branch: some OpenCL compilers cannot have it there. */
    const float top = score[largest(score, n, best, where)];
    float total = 0.0f;
    for (int i = 0; i < n; ++i) total += exp(score[i] - top);
    BARRIER();
    for (int i = tid; i < n; i += THREADS) {
        if (gating == 0) score[i] = exp(score[i] - top) / total;
        if (gating == 1) score[i] = 0.5f + 0.5f * tanh(0.5f * score[i]);
        choice[i] = bias ? score[i] + bias[i] : score[i];
    }
    BARRIER();
    /* Of several groups keep those whose two best scores sum highest (DeepSeek-V3). */
    const int size = n / n_group;
    for (int g = tid; g < n_group; g += THREADS) {
        float first = LOWEST, second = LOWEST;
        for (int i = g * size; i < (g + 1) * size; ++i) {
            second = fmax(second, fmin(first, choice[i]));
            first = fmax(first, choice[i]);
        }
        group[g] = size > 1 ? first + second : first;
    }
    BARRIER();
    for (int i = 0; i < n_group_used; ++i) {
        const int g = largest(group, n_group, best, where);
        if (tid == 0) group[g] = LOWEST;
        BARRIER();
    }
    for (int i = tid; i < n; i += THREADS)
        if (group[i / size] > LOWEST) choice[i] = LOWEST;
    BARRIER();
    for (int i = 0; i < k; ++i) {
        const int e = largest(choice, n, best, where);
        if (tid == 0) {
            experts[row * k + i] = e;
            weights[row * k + i] = score[e];
            choice[e] = LOWEST;
        }
        BARRIER();
    }
    if (tid) return;
    GLOBAL float* w = weights + row * k;
    const float first = w[0];
    total = 0.0f;
    if (gating == 2)
        for (int i = 0; i < k; ++i) w[i] = exp(w[i] - first);
    for (int i = 0; i < k; ++i) total += w[i];
    for (int i = 0; i < k; ++i) w[i] = (gating == 2 || renormalise ? w[i] / total : w[i]) * scale;
}

/* Sum over k of x [T, k, n] * weights [T, k]. */
KERNEL void combine_experts(GLOBAL const float* x, GLOBAL const float* weights, GLOBAL float* y, const int k, const int n,
                            const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const ulong t = (ulong)(i / n);
    float sum = 0.0f;
    for (int j = 0; j < k; ++j) sum += x[(t * k + j) * n + (ulong)(i % n)] * weights[t * k + j];
    y[i] = sum;
}

/* Sort the choices by expert, and cut each expert's run into tiles of `size`: see matmul_experts. One group. The
   order within a run is any: each choice's product is its own. */
KERNEL void sort_choices(GLOBAL const int* experts, GLOBAL int* order, GLOBAL int* tiles, const int n_choices,
                         const int n, const int size, const int n_tiles) {
    LOCAL int count[MAX_EXPERTS];
    LOCAL int next[MAX_EXPERTS];
    LOCAL int first_tile[MAX_EXPERTS];
    const int tid = LOCAL_ID(0), threads = LOCAL_SIZE(0);
    for (int e = tid; e < n; e += threads) count[e] = 0;
    for (int i = tid; i < n_tiles; i += threads) tiles[3 * i + 2] = 0;
    BARRIER_GLOBAL();
    for (int c = tid; c < n_choices; c += threads) ATOMIC_ADD(&count[experts[c]], 1);
    BARRIER();
    if (tid == 0)
        for (int e = 0, at = 0, tile = 0; e < n; ++e) {
            next[e] = at;
            first_tile[e] = tile;
            at += count[e];
            tile += (count[e] + size - 1) / size;
        }
    BARRIER();
    for (int e = tid; e < n; e += threads)
        for (int i = 0; i * size < count[e]; ++i) {
            GLOBAL int* tile = tiles + 3 * (first_tile[e] + i);
            tile[0] = e;
            tile[1] = next[e] + i * size;
            tile[2] = count[e] - i * size < size ? count[e] - i * size : size;
        }
    BARRIER();
    for (int c = tid; c < n_choices; c += threads) order[ATOMIC_ADD(&next[experts[c]], 1)] = c;
}
