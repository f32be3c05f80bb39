"""A decoding step of a Llama-type model on a CPU as one compiled function: `step`.

torch starts some fifty operations a block and reads 16-bit weights far below the rate that memory gives. Here all
threads go through the blocks together, each with its share of the rows or of the outputs, and meet in between.

The innermost loop, `dots`, is written as LLVM vectors, so that it takes the processor's bf16 products where it has them
and adds up in the same order whoever else is in the batch: a row's logits are the same bits in every batch.

Shapes: L layers, N rows, H hidden size, D head size, V vocabulary.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from repertory.model.kernel import (
    FAST,
    FP32,
    INT64,
    LANES,
    LLVM_FLOAT,
    LLVM_INT32,
    Kernel,
    address,
    argument,
    atomic_add,
    compiled,
    exp,
    float_argument,
    get,
    intrinsic,
    pointer,
    put,
    table,
)
from repertory.model.vectors import FLOATS, Vectors, number

MOST_ROWS = 4 if LANES == 16 else 2  # at a time: what the registers hold the sums of
COLUMNS = 4  # outputs at a time; `_sums` is written for four
RANK_MULTIPLE = 16  # of the adapters' ranks
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Q, _K, _V, _O, _GATE, _UP, _DOWN = range(len(PROJECTIONS))
LINE_BYTES = 64  # of a cache
VOICE_BLOCKS_AHEAD = 4  # as below, of the voices' B
BLOCKS_AHEAD = 2  # the rows of W that are fetched from memory while others are multiplied
SPINS = 20_000  # of a thread that waits for the others, before it lets another process have the core


def _dots(rows: int) -> Any:
    @intrinsic
    def dots(typing, w, x, stride, xs, bs, ranks, voice_stride, output, low, low_stride, out, out_stride):
        """out[j, c] = sum_i w[c, i] x[j, i] + sum_k b_j[output + c, k] low[j, k], for j < rows and c < COLUMNS.

        `stride`: elements of a row of w; `xs` of one of x: as many as there are products, or as lie between two rows.
        Of row j, b_j is at the address bs[j * voice_stride], and has ranks[j * voice_stride] columns.
        """
        n = types.int64
        signature = types.void(w, x, n, n, bs, ranks, n, n, low, n, out, n)

        def generate(context, builder, signature, args):
            _Dots(builder, rows, w.dtype == types.uint16, x.dtype == types.uint16).emit(*args)
            return context.get_dummy_value()

        return signature, generate

    return dots


class _Dots(Vectors):
    """Writes the instructions of `dots`."""

    def __init__(self, builder: Any, rows: int, has_half_weights: bool, has_half_inputs: bool) -> None:
        super().__init__(builder)
        self.rows = rows
        self.has_half_weights = has_half_weights
        self.has_half_inputs = has_half_inputs  # then two at a time are multiplied, by the processor's bf16 products
        self.step = 2 * LANES if has_half_inputs else LANES

    def emit(self, w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride) -> None:
        b = self.builder

        def products(sums, at, mask=None):
            places = [b.add(b.mul(count, number(c)), at) for c in range(COLUMNS)]
            ws = [self.loaded(w, place, self.has_half_weights, mask) for place in places]
            if mask is None:
                for place in places:
                    self.prefetch(b.gep(w, [b.add(place, b.mul(count, number(BLOCKS_AHEAD * COLUMNS)))]))
            if not self.has_half_inputs:
                ws = [self.widened(one) for one in ws]
            found = []
            for j in range(self.rows):
                inputs = self.loaded(x, b.add(b.mul(x_stride, number(j)), at), self.has_half_inputs, mask)
                for c in range(COLUMNS):
                    found.append(self.multiplied(inputs, ws[c], sums[j * COLUMNS + c]))
            return found

        zero = ir.Constant(FLOATS, [0.0] * LANES)
        sums, at = self.loop(count, self.step, [zero] * self.rows * COLUMNS, products)
        sums = self.with_rest(sums, at, count, products)
        voices = [b.mul(voice_stride, number(j)) for j in range(self.rows)]
        Bs = [b.load(b.gep(bs, [voice])) for voice in voices]
        rank = [b.load(b.gep(ranks, [voice])) for voice in voices]

        def correct(sums, first, end):
            """Rows from first to end, which have the voice of the first one."""
            size = 2 if self.has_half_weights else 4
            begin = b.add(Bs[first], b.mul(b.mul(output, rank[first]), number(size)))
            B = b.inttoptr(begin, w.type)
            for line in range(0, COLUMNS * RANK_MULTIPLE * size, LINE_BYTES):
                ahead = b.mul(rank[first], number(VOICE_BLOCKS_AHEAD * COLUMNS * size))
                self.prefetch(b.inttoptr(b.add(begin, b.add(ahead, number(line))), w.type))

            def corrections(sums, at):
                places = [b.add(b.mul(rank[first], number(c)), at) for c in range(COLUMNS)]
                weights = [self.widened(self.loaded(B, place, self.has_half_weights, lanes=LANES)) for place in places]
                found = []
                for j in range(first, end):
                    place = b.add(b.mul(low_stride, number(j)), at)
                    lows = self.loaded(low, place, False, lanes=LANES)
                    row = sums[(j - first) * COLUMNS : (j - first + 1) * COLUMNS]
                    found += [self.fma(weight, lows, total) for weight, total in zip(weights, row, strict=True)]
                return found

            return self.loop(rank[first], LANES, sums[first * COLUMNS : end * COLUMNS], corrections)[0]

        one_voice = ir.Constant(ir.IntType(1), 1)
        for other in Bs[1:]:
            one_voice = b.and_(one_voice, b.icmp_signed("==", Bs[0], other))
        sums = self.either(
            one_voice,
            lambda: correct(sums, 0, self.rows),
            lambda: [total for j in range(self.rows) for total in correct(sums, j, j + 1)],
        )
        for j in range(self.rows):
            place = b.gep(out, [b.mul(out_stride, number(j))])
            row = self.total(sums[j * COLUMNS : (j + 1) * COLUMNS])
            b.store(row, b.bitcast(place, ir.PointerType(row.type)), align=4)

    def with_rest(self, sums, at, count, products):
        """With what is left of rows that are no multiple of the step."""
        b = self.builder

        def rest():
            lanes = ir.VectorType(LLVM_INT32, self.step)
            left = b.insert_element(
                ir.Constant(lanes, ir.Undefined), b.trunc(b.sub(count, at), LLVM_INT32), LLVM_INT32(0)
            )
            left = b.shuffle_vector(left, left, ir.Constant(lanes, [0] * self.step))
            return products(sums, at, b.icmp_signed("<", ir.Constant(lanes, list(range(self.step))), left))

        return self.either(b.icmp_signed("<", at, count), rest, lambda: sums)

    def loaded(self, base, at, is_half, mask=None, lanes=None):
        b = self.builder
        kind = ir.VectorType(ir.IntType(16) if is_half else LLVM_FLOAT, lanes or self.step)
        size = 2 if is_half else 4
        place = b.bitcast(b.gep(base, [at]), ir.PointerType(kind))
        if mask is None:
            return b.load(place, align=size)
        name = f"llvm.masked.load.v{self.step}{'i16' if is_half else 'f32'}.p0"
        load = self.function(name, kind, [place.type, LLVM_INT32, mask.type, kind])
        return b.call(load, [place, LLVM_INT32(size), mask, ir.Constant(kind, None)])

    def widened(self, numbers):
        if not self.has_half_weights:
            return numbers
        wide = ir.VectorType(LLVM_INT32, LANES)
        shifted = self.builder.shl(self.builder.zext(numbers, wide), ir.Constant(wide, [16] * LANES))
        return self.builder.bitcast(shifted, FLOATS)

    def multiplied(self, x, w, total):
        if not self.has_half_inputs:
            return self.fma(x, w, total)
        return self.bf16_products(x, w, total)

    def total(self, vectors):
        """The sums of four vectors' elements as one vector: they are transposed while they are added up."""

        def folded(one, other, width):
            first = []
            for begin in range(0, LANES, 2 * width):
                first += [*range(begin, begin + width), *range(LANES + begin, LANES + begin + width)]
            return self.added(one, other, first, [at + width for at in first])

        total = folded(folded(vectors[0], vectors[1], 1), folded(vectors[2], vectors[3], 1), 2)
        lanes = LANES
        while lanes > COLUMNS:
            lanes //= 2
            total = self.added(total, total, list(range(lanes)), list(range(lanes, 2 * lanes)))
        return total

    def added(self, one, other, first, second):
        b, index = self.builder, ir.VectorType(LLVM_INT32, len(first))
        halves = [b.shuffle_vector(one, other, ir.Constant(index, places)) for places in (first, second)]
        return b.fadd(*halves)


_dots_1, _dots_2, _dots_3, _dots_4 = _dots(1), _dots(2), _dots(3), _dots(4)


@compiled()
def dots(rows, w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride):
    """Of at most MOST_ROWS of the `rows`."""
    if rows == 1:
        _dots_1(w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride)
    elif rows == 2 or MOST_ROWS == 2:
        _dots_2(w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride)
    elif rows == 3:
        _dots_3(w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride)
    else:
        _dots_4(w, x, count, x_stride, bs, ranks, voice_stride, output, low, low_stride, out, out_stride)


@intrinsic
def _atomic_load(typing, place):
    def generate(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def _atomic_store(typing, place, value):
    def generate(context, builder, signature, args):
        builder.store_atomic(args[1], args[0], "release", 8)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64), types.int64), generate


_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@compiled()
def meet(meeting, threads):
    """Wait until all threads are here. `meeting`: (2, 8), its rows a cache line each."""
    if threads == 1:
        return
    came, round_ = pointer(address(meeting, 0), meeting), pointer(address(meeting, 8), meeting)
    now = _atomic_load(round_)
    if atomic_add(came, 1) == threads - 1:
        _atomic_store(came, 0)
        _atomic_store(round_, now + 1)
        return
    spins = 0
    while _atomic_load(round_) == now:
        spins += 1
        if spins > SPINS:
            _sched_yield()


@compiled(inline="always")
def share(count, multiple, thread, threads):
    """A thread's part of `count`: where it begins and ends, in whole multiples."""
    multiples = -(-count // multiple)
    begin, end = multiples * thread // threads, multiples * (thread + 1) // threads
    return min(begin * multiple, count), min(end * multiple, count)


@compiled(fastmath=FAST)
def normalise(x, weight, eps, out):
    """Root mean square normalisation: https://arxiv.org/abs/1910.07467."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        put(out, i, x[i] * scale * weight[i])


@compiled()
def product(begin, end, first, W, like, width, x, count, Bs, ranks, low, out):
    """out[n, o] for `count` rows of x and the outputs o from begin to end of W, of a layer that begins at `first`.

    W: address of (outputs, width), elements as in `like`. Bs and ranks: of each row's voice, where that layer's stand.
    """
    outputs, voice_stride, low_stride = out.shape[1], Bs.strides[0] // 8, low.strides[0] // 4
    for block in range(begin, end, COLUMNS):
        o = min(block, end - COLUMNS)  # the last ones may overlap, and then say the same again
        w = pointer(W + o * width * like.itemsize, like)
        for n in range(0, count, MOST_ROWS):
            dots(
                count - n,
                w,
                pointer(address(x, n * width), x),
                width,
                width,
                pointer(address(Bs, n * voice_stride), Bs),
                pointer(address(ranks, n * voice_stride), ranks),
                voice_stride,
                o - first,
                pointer(address(low, n * low_stride), low),
                low_stride,
                pointer(address(out, n * outputs + o), out),
                outputs,
            )


@compiled()
def lower(begin, end, As, ranks, scalings, like, x, low, nothing):
    """low[n, :rank] = scaling * A x[n] for the rows n from begin to end, each of its own voice.

    As and ranks: of each row's voice, where those of one layer stand.
    """
    width, low_stride, none = x.shape[1], low.strides[0] // 4, pointer(address(nothing, 0), nothing)
    n = begin
    while n < end:
        A, rank, rows = As[n], ranks[n], 1
        while rows < MOST_ROWS and n + rows < end and As[n + rows] == A:
            rows += 1
        for k in range(0, rank, COLUMNS):
            w = pointer(A + k * width * like.itemsize, like)
            x_n, low_k = pointer(address(x, n * width), x), pointer(address(low, n * low_stride + k), low)
            dots(rows, w, x_n, width, width, none, none, 0, 0, low_k, 0, low_k, low_stride)
        for row in range(n, n + rows):
            for k in range(rank):
                low[row, k] *= scalings[row]
        n += rows


@compiled(fastmath=FAST)
def turn(head, weight, eps, is_normal, cos, sin, spare):
    """In place: normalised where the model does that, and turned to its position (https://arxiv.org/abs/2104.09864)."""
    half = len(head) // 2
    scale = np.float32(1)
    if is_normal:
        total = np.float32(0)
        for i in range(len(head)):
            total += head[i] * head[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(len(head)) + eps)
    for i in range(len(head)):
        spare[i] = head[i] * scale * weight[i]
    for i in range(half):
        head[i] = spare[i] * cos[i] - spare[half + i] * sin[i]
        head[half + i] = spare[half + i] * cos[half + i] + spare[i] * sin[half + i]


@compiled(fastmath=FAST)
def weigh(scores, begin, end, scale):
    """Of scores their exponentials, in place; their sum is returned."""
    most = scores[begin]
    for s in range(begin + 1, end):
        most = max(most, scores[s])
    total = np.float32(0)
    for s in range(begin, end):
        weight = exp((scores[s] - most) * scale)
        scores[s] = weight
        total += weight
    return total


ONE = np.float32(1)


@compiled(fastmath=FAST)
def add(total, weight, values, first):
    for d in range(len(total)):
        total[d] += weight * get(values, first + d)


@compiled(fastmath=FAST)
def gate(wide, begin, end, width, out):
    """silu(gate) * up, the two side by side in `wide`, each of `width`."""
    for j in range(begin, end):
        put(out, j, wide[j] / (np.float32(1) + exp(-wide[j])) * wide[width + j])


@compiled()
def attend(g, qkv, heads, groups, place, K, V, like, window, scale, eps, is_normal, norms, cos, sin, out, own, nothing):
    """A row's key head g: its key and value into the cache, and into `out` what its query heads find there.

    K, V: addresses of (tokens, D). norms: (2, D), of queries and keys. own: this thread's memory.
    """
    turned, scores, total = own
    group, D = heads // groups, len(total)
    end = place + 1
    begin = max(0, end - window) if window > 0 else 0
    keys, values = carray(pointer(K, like), (end * D,)), carray(pointer(V, like), (end * D,))
    key = qkv[(heads + g) * D : (heads + g + 1) * D]
    value = qkv[(heads + groups + g) * D : (heads + groups + g + 1) * D]
    turn(key, norms[1], eps, is_normal, cos, sin, total)
    for d in range(D):
        put(keys, place * D + d, key[d])
        put(values, place * D + d, value[d])
    for h in range(group):
        query = qkv[(g * group + h) * D : (g * group + h + 1) * D]
        turn(query, norms[0], eps, is_normal, cos, sin, total)
        for d in range(D):
            put(turned, h * D + d, query[d])
    none, longest = pointer(address(nothing, 0), nothing), scores.shape[1]
    # Up to three keys more than are seen are multiplied: the row of the cache has room for whole fours.
    for s in range(begin // COLUMNS * COLUMNS, end, COLUMNS):
        for h in range(0, group, MOST_ROWS):
            w, x = pointer(K + s * D * like.itemsize, like), pointer(address(turned, h * D), turned)
            found = pointer(address(scores, h * longest + s), scores)
            dots(group - h, w, x, D, D, none, none, 0, 0, found, 0, found, longest)
    for h in range(group):
        weights = weigh(scores[h], begin, end, scale)
        total[:] = 0
        for s in range(begin, end):
            add(total, scores[h, s], values, s * D)
        first = (g * group + h) * D
        for d in range(D):
            put(out, first + d, total[d] / weights)


@Kernel
def step(asked, thread, like):
    """One thread's part in a step; a block of the work is a thread, and all meet.

    Asked are the output embeddings, and then what `Decoder` puts together, in the order of `_start`.
    """
    _start(asked, thread, like, like)


@Kernel
def step_without_bf16_products(asked, thread, like):
    _start(asked, thread, like, FP32)


@compiled()
def _start(asked, thread, like, inputs):
    """`inputs`: as what elements of what is multiplied with the weights are held."""
    head, meeting, threads = argument(asked, 0), table(argument(asked, 1), (2, 8), INT64), argument(asked, 2)
    layers, count, H, V = argument(asked, 3), argument(asked, 4), argument(asked, 5), argument(asked, 6)
    heads, groups, D, inter = argument(asked, 7), argument(asked, 8), argument(asked, 9), argument(asked, 10)
    rank, longest = argument(asked, 11), argument(asked, 12)
    queries, qkv = heads * D, (heads + 2 * groups) * D
    P = len(PROJECTIONS)
    model = (
        like,
        (heads, groups, D, inter, argument(asked, 13) != 0),
        float_argument(asked, 14),
        float_argument(asked, 15),
        table(argument(asked, 16), (layers, 4), INT64),
        head,
        table(argument(asked, 17), (2 * layers + 1, H), FP32),
        table(argument(asked, 18), (layers, qkv), FP32),
        table(argument(asked, 19), (layers, 2, D), FP32),
        table(argument(asked, 20), (layers,), INT64),
    )
    rows = (
        table(argument(asked, 21), (count, H), FP32),
        table(argument(asked, 22), (count, D), FP32),
        table(argument(asked, 23), (count, D), FP32),
        table(argument(asked, 24), (count,), INT64),
        table(argument(asked, 25), (layers, count, 3), INT64),
    )
    voices = (
        argument(asked, 26) != 0,
        table(argument(asked, 27), (count, layers, P), INT64),
        table(argument(asked, 28), (count, layers, P), INT64),
        table(argument(asked, 29), (count, layers, P), INT64),
        table(argument(asked, 30), (count,), FP32),
        table(argument(asked, 31), (count,), INT64),
    )
    memory = (
        table(argument(asked, 32), (count, H), inputs),
        table(argument(asked, 33), (count, queries), inputs),
        table(argument(asked, 34), (count, inter), inputs),
        table(argument(asked, 35), (count, P, rank), FP32),
        table(argument(asked, 36), (count, qkv), FP32),
        table(argument(asked, 37), (count, H), FP32),
        table(argument(asked, 38), (count, 2 * inter), FP32),
        table(argument(asked, 39), (count, V), FP32),
        table(argument(asked, 40), (threads, heads // groups * D), inputs),
        table(argument(asked, 41), (threads, heads // groups, longest), FP32),
        table(argument(asked, 42), (threads, D), FP32),
    )
    _step(thread, threads, meeting, model, rows, voices, memory)


@compiled()
def _step(thread, threads, meeting, model, rows, voices, memory):
    """Of each of `rows` the logits are then in `memory`."""
    like, sizes, eps, scale, weights, head, norms, biases, head_norms, windows = model
    hidden, cos, sin, places, kv = rows
    has_voices, As, Bs, ranks, scalings, nothing = voices
    x, attended, gated, low, qkv, back, wide, logits, all_turned, all_scores, all_totals = memory
    heads, groups, D, inter, is_normal = sizes
    layers, count, H, queries, keys = len(weights), len(hidden), hidden.shape[1], heads * D, groups * D
    own = all_turned[thread], all_scores[thread], all_totals[thread]
    first_row, end_row = share(count, 1, thread, threads)
    begin, end = share(H, 16, thread, threads)
    first_inter, end_inter = share(inter, 16, thread, threads)
    first_qkv, end_qkv = share(queries + 2 * keys, 16, thread, threads)
    first_seen, end_seen = share(count * groups, 1, thread, threads)
    for layer in range(layers):
        qkv_W, o_W, gate_up_W, down_W = weights[layer]
        for n in range(first_row, end_row):
            normalise(hidden[n], norms[2 * layer], eps, x[n])
        if has_voices:
            for p in range(_Q, _V + 1):
                lower(first_row, end_row, As[:, layer, p], ranks[:, layer, p], scalings, like, x, low[:, p], nothing)
        meet(meeting, threads)
        first = 0
        for p in range(_Q, _V + 1):
            last = first + (queries if p == _Q else keys)
            Bs_p, ranks_p = Bs[:, layer, p:], ranks[:, layer, p:]
            outputs = max(first, first_qkv), min(last, end_qkv)
            product(outputs[0], outputs[1], first, qkv_W, like, H, x, count, Bs_p, ranks_p, low[:, p], qkv)
            first = last
        for n in range(count):
            add(qkv[n, first_qkv:end_qkv], ONE, biases[layer], first_qkv)
        meet(meeting, threads)
        for seen in range(first_seen, end_seen):
            n, g = seen // groups, seen % groups
            K, V, capacity = kv[layer, n]
            skipped = g * capacity * D * like.itemsize
            attend(
                g,
                qkv[n],
                heads,
                groups,
                places[n],
                K + skipped,
                V + skipped,
                like,
                windows[layer],
                scale,
                eps,
                is_normal,
                head_norms[layer],
                cos[n],
                sin[n],
                attended[n],
                own,
                nothing,
            )
        meet(meeting, threads)
        if has_voices:
            As_p, ranks_p = As[:, layer, _O], ranks[:, layer, _O]
            lower(first_row, end_row, As_p, ranks_p, scalings, like, attended, low[:, _O], nothing)
            meet(meeting, threads)
        Bs_p, ranks_p = Bs[:, layer, _O:], ranks[:, layer, _O:]
        product(begin, end, 0, o_W, like, queries, attended, count, Bs_p, ranks_p, low[:, _O], back)
        for n in range(count):
            add(hidden[n, begin:end], ONE, back[n], begin)
        meet(meeting, threads)
        for n in range(first_row, end_row):
            normalise(hidden[n], norms[2 * layer + 1], eps, x[n])
        if has_voices:
            for p in range(_GATE, _UP + 1):
                lower(first_row, end_row, As[:, layer, p], ranks[:, layer, p], scalings, like, x, low[:, p], nothing)
        meet(meeting, threads)
        for p in range(_GATE, _UP + 1):
            first = (p - _GATE) * inter
            Bs_p, ranks_p = Bs[:, layer, p:], ranks[:, layer, p:]
            outputs = first + first_inter, first + end_inter
            product(outputs[0], outputs[1], first, gate_up_W, like, H, x, count, Bs_p, ranks_p, low[:, p], wide)
        for n in range(count):
            gate(wide[n], first_inter, end_inter, inter, gated[n])
        meet(meeting, threads)
        if has_voices:
            As_p, ranks_p = As[:, layer, _DOWN], ranks[:, layer, _DOWN]
            lower(first_row, end_row, As_p, ranks_p, scalings, like, gated, low[:, _DOWN], nothing)
            meet(meeting, threads)
        Bs_p, ranks_p = Bs[:, layer, _DOWN:], ranks[:, layer, _DOWN:]
        product(begin, end, 0, down_W, like, inter, gated, count, Bs_p, ranks_p, low[:, _DOWN], back)
        for n in range(count):
            add(hidden[n, begin:end], ONE, back[n], begin)
        meet(meeting, threads)
    for n in range(first_row, end_row):
        normalise(hidden[n], norms[2 * layers], eps, x[n])
    meet(meeting, threads)
    begin, end = share(logits.shape[1], 16, thread, threads)
    product(begin, end, 0, head, like, H, x, count, nothing, nothing, low[:, 0], logits)
