// Blocks of whole vectors of adjacent columns, the last of which may be a part of one. Included after
// lanes_io.h inside a namespace of foreach_isa.h; no include guard.

template <class T>
KR_FN f32v read(const T* from, int live) {
    return live == kLanes ? load_as(from) : load_as_part(from, live);
}
template <class T>
KR_FN void write(T* to, f32v a, int live) {
    if (live == kLanes)
        store_as(to, a);
    else
        store_as_part(to, a, live);
}

// Calls F::run<vectors>(..., column, live) for each block: V vectors, one vector, or its first `live` lanes.
template <class F, int V, class... Arguments>
KR_FN void each_block(int64_t width, const Arguments&... arguments) {
    int64_t c = 0;
    for (; c + V * kLanes <= width; c += V * kLanes) F::template run<V>(arguments..., c, kLanes);
    for (; c + kLanes <= width; c += kLanes) F::template run<1>(arguments..., c, kLanes);
    if (c < width) F::template run<1>(arguments..., c, (int)(width - c));
}
