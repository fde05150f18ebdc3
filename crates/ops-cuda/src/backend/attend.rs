//! Attention over the latent cache, in both forms.

use cadre_ops::{AttentionShape, KvLayout, OpsError, check};

use super::{
    CudaBackend, Step, THREADS,
    planes::Plane,
    product::{Input, Output, Which, product},
    queue::{CudaQueue, Scratch},
    step::Naive,
    tensor,
    weights::{Attention, KvUp, PlainKvUp, Vector, element_bytes},
};
use crate::{
    device::Memory,
    kernels::{Kernel, SHARED_BYTES},
    launch::{Arg, Grid},
};

/// Rows in absorbed form that share scratch memory: latent queries and outputs of V3's 128 heads are 33 MB each.
pub(crate) const LATENT_ROWS: usize = 128;

/// Bytes of expanded keys and values that are there at a time; at least one head's.
pub(crate) const EXPANDED_BYTES: usize = 256 << 20;

/// The latent cache of every layer.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layout: KvLayout,
    pub(crate) bf16: bool,
    /// Pages in tiles (kernels/cache.cuh).
    pub(crate) tiled: bool,
    pub(crate) memory: Memory,
}

/// Bytes of a page of one layer.
pub(crate) fn page_bytes(layout: &KvLayout, bf16: bool, tiled: bool) -> usize {
    if tiled {
        return (layout.kv_lora_rank.div_ceil(64) + 1) * KvLayout::PAGE_TOKENS * 64 * 2;
    }
    layout.page_tokens * (layout.kv_lora_rank + layout.qk_rope_head_dim) * if bf16 { 2 } else { 4 }
}

impl KvCache {
    pub(crate) fn page_bytes(&self) -> usize {
        page_bytes(&self.layout, self.bf16, self.tiled)
    }

    /// Bytes of a row as it travels.
    pub(crate) fn row_bytes(&self) -> usize {
        (self.layout.kv_lora_rank + self.layout.qk_rope_head_dim) * if self.bf16 { 2 } else { 4 }
    }

    /// Where a layer's pages start.
    pub(crate) fn layer(&self, layer: usize) -> u64 {
        self.memory.at(layer * self.layout.pages * self.page_bytes())
    }

    /// What every kernel of the cache takes first.
    pub(crate) fn args(&self, layer: usize) -> [Arg<'static>; 5] {
        [
            Arg::Pointer(self.layer(layer)),
            Arg::U32(self.layout.kv_lora_rank as u32),
            Arg::U32(self.layout.qk_rope_head_dim as u32),
            self.bf16.into(),
            self.tiled.into(),
        ]
    }
}

/// Heads whose expanded keys and values are there at a time.
pub(crate) fn heads_at_once(heads: usize, positions: usize, head_width: usize) -> usize {
    (EXPANDED_BYTES / (positions * head_width * 4).max(1)).clamp(1, heads)
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(crate) fn append(
    queue: &mut CudaQueue,
    step: &Step,
    attention: &Attention,
    kv_a: &Plane,
    norm: &Vector,
    eps: f32,
    layer: usize,
    cache: &mut KvCache,
) -> Result<(), OpsError> {
    let shape = &attention.shape;
    check::kv_append("kv_append", step.info(), shape, &cache.layout, layer, kv_a.dims, norm.len)?;
    let args = [
        kv_a.into(),
        kv_a.bf16.into(),
        (&norm.memory).into(),
        eps.into(),
        Arg::U32(shape.kv_lora as u32),
        Arg::U32(shape.rope as u32),
        Arg::Pointer(step.positions()),
        Arg::Pointer(step.places()),
        (&attention.angles).into(),
        Arg::Pointer(cache.layer(layer)),
        cache.tiled.into(),
    ];
    queue.launch(Kernel::KvAppend, Grid::of(step.info().rows, THREADS), &args)
}

pub(crate) fn rotate(
    queue: &mut CudaQueue,
    step: &Step,
    attention: &Attention,
    q: &mut Plane,
) -> Result<(), OpsError> {
    let shape = &attention.shape;
    check::rope_query("rope_query", step.info(), shape, q.dims)?;
    let args = [
        (&*q).into(),
        q.bf16.into(),
        Arg::U32(shape.heads as u32),
        Arg::U32(shape.nope as u32),
        Arg::U32(shape.rope as u32),
        Arg::Pointer(step.positions()),
        (&attention.angles).into(),
    ];
    queue.launch(Kernel::RopeQuery, Grid::of(step.info().rows, THREADS), &args)
}

impl CudaBackend {
    /// The latent cache of every layer, zeroed.
    pub(crate) fn cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        let op = "kv_cache";
        let bf16 = self.rounds();
        let tiled = self.tensor() && tensor::covers_cache(&layout);
        check::kv_layout(op, &layout)?;
        let bytes = check::product(op, layout.layers * layout.pages, page_bytes(&layout, bf16, tiled))?;
        // A place in a layer is 32 bits wide on the device.
        check::at_least(
            op,
            "places of a layer",
            u32::MAX as usize,
            layout.pages.saturating_mul(KvLayout::PAGE_TOKENS),
        )?;
        let memory = Memory::zeroed(&self.stream, op, bytes)?;
        self.stream.synchronize(op)?;
        Ok(KvCache { layout, bf16, tiled, memory })
    }

    /// The rotary table of a shape that the kernels can hold.
    pub(crate) fn attention_of(&self, shape: &AttentionShape) -> Result<Attention, OpsError> {
        let op = "load_attention";
        check::attention_shape(op, shape)?;
        // Query, output and probabilities of a row and head lie in shared memory.
        let words = 2 * shape.kv_lora + shape.rope + shape.nope + shape.v + 2 * KvLayout::PAGE_TOKENS;
        check::at_least(op, "elements of shared memory for a head", SHARED_BYTES as usize / 4, words)?;
        self.loader.attention(op, shape)
    }

    #[allow(clippy::too_many_arguments, reason = "the trait's operation")]
    pub(crate) fn attention(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &Plane,
    ) -> Result<(), OpsError> {
        let (op, shape) = ("attend", &attention.shape);
        check::step_cache(op, step.info(), shape, &cache.layout, layer)?;
        check::attention_io(op, shape, step.info(), q.dims, out.dims)?;
        check::equal(op, "rows of kv_b", kv_up.dims.rows, shape.heads * (shape.nope + shape.v))?;
        check::equal(op, "columns of kv_b", kv_up.dims.cols, shape.kv_lora)?;
        let Some(plain) = &kv_up.plain else {
            for run in step.runs() {
                self.tensor_absorbed(op, queue, step, run, shape, kv_up, q, layer, cache, out)?;
            }
            return step.naive().iter().try_for_each(|segment| {
                self.tensor_naive(op, queue, step, segment, shape, kv_up, q, layer, cache, out)
            });
        };
        let mut from = 0;
        loop {
            let (rows, left) = step.absorbed(from);
            if left == 0 {
                break;
            }
            let count = left.min(LATENT_ROWS);
            self.absorbed(op, queue, step, (rows, count), attention, plain, q, layer, cache, out)?;
            from += count;
        }
        step.naive().iter().try_for_each(|segment| {
            self.naive(op, queue, step, segment, attention, plain, q, layer, cache, out)
        })
    }

    #[allow(clippy::too_many_arguments, reason = "a part of the trait's operation")]
    fn absorbed(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        step: &Step,
        (rows, count): (u64, usize),
        attention: &Attention,
        kv_up: &PlainKvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &Plane,
    ) -> Result<(), OpsError> {
        let shape = &attention.shape;
        let u32s = |value: usize| Arg::U32(value as u32);
        let bytes = check::product(op, count * shape.heads, shape.kv_lora * 4)?;
        let q_lat = queue.scratch(op, Scratch::Wide, bytes)?;
        let latent = queue.scratch(op, Scratch::Inner, bytes)?;
        let weight = &kv_up.packed;
        let scales = Arg::Pointer(weight.scales.as_ref().map_or(0, Memory::address));
        let element = u32s(element_bytes(weight.elements));
        let grid = Grid::of(count, 256).by(shape.heads);
        queue.launch(
            Kernel::Absorb,
            grid,
            &[
                q.into(),
                q.bf16.into(),
                Arg::Pointer(rows),
                u32s(shape.heads),
                u32s(shape.nope),
                u32s(shape.rope),
                u32s(shape.v),
                u32s(shape.kv_lora),
                (&kv_up.stored).into(),
                element,
                scales,
                Arg::Pointer(q_lat),
            ],
        )?;
        // q, o, 64 probabilities.
        let shared = 4 * (shape.kv_lora + shape.rope + shape.kv_lora + KvLayout::PAGE_TOKENS);
        queue.launch(
            Kernel::AttendLatent,
            grid.shared(shared),
            &[
                q.into(),
                q.bf16.into(),
                Arg::Pointer(q_lat),
                Arg::Pointer(rows),
                Arg::Pointer(step.positions()),
                Arg::Pointer(step.tables()),
                Arg::Pointer(step.pages(0)),
                u32s(shape.heads),
                u32s(shape.nope),
                u32s(shape.rope),
                u32s(shape.kv_lora),
                shape.softmax_scale.into(),
                Arg::Pointer(cache.layer(layer)),
                cache.bf16.into(),
                cache.tiled.into(),
                Arg::Pointer(latent),
            ],
        )?;
        queue.launch(
            Kernel::ValueUp,
            Grid::of(count, 128).by(shape.heads),
            &[
                Arg::Pointer(latent),
                Arg::Pointer(rows),
                u32s(shape.heads),
                u32s(shape.nope),
                u32s(shape.v),
                u32s(shape.kv_lora),
                (&weight.words).into(),
                element,
                scales,
                out.into(),
                out.bf16.into(),
            ],
        )
    }

    #[allow(clippy::too_many_arguments, reason = "a part of the trait's operation")]
    fn naive(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        step: &Step,
        segment: &Naive,
        attention: &Attention,
        kv_up: &PlainKvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &Plane,
    ) -> Result<(), OpsError> {
        let shape = &attention.shape;
        let u32s = |value: usize| Arg::U32(value as u32);
        let positions = segment.first_position + segment.rows;
        let (width, head_width) = (shape.kv_lora + shape.rope, shape.nope + shape.v);
        let latents = queue.scratch(op, Scratch::Latents, check::product(op, positions, width * 4)?)?;
        let pages = Arg::Pointer(step.pages(segment.table));
        let mut args = cache.args(layer).to_vec();
        args.extend([pages, Arg::U32(0), Arg::Pointer(latents)]);
        queue.launch(Kernel::KvGather, Grid::of(positions, 128), &args)?;
        let at_once = heads_at_once(shape.heads, positions, head_width);
        let bytes = check::product(op, positions, at_once * head_width * 4)?;
        let expanded = queue.scratch(op, Scratch::Expanded, bytes)?;
        let x = Input { values: latents, bf16: false, codes: None, stride: width, rows: 0 };
        let shared = 4 * (shape.nope + shape.rope + shape.v + KvLayout::PAGE_TOKENS);
        for first in (0..shape.heads).step_by(at_once) {
            let heads = at_once.min(shape.heads - first);
            let stride = heads * head_width;
            let y = Output { values: expanded, bf16: false, stride, rows: 0 };
            let columns = first * head_width..first * head_width + stride;
            let weight = &kv_up.packed;
            product(queue, weight.elements, x, Which::One(weight, positions), shape.kv_lora, columns, y)?;
            queue.launch(
                Kernel::AttendExpanded,
                Grid::of(segment.rows, 256).by(heads).shared(shared),
                &[
                    q.into(),
                    q.bf16.into(),
                    u32s(segment.first_row),
                    u32s(segment.first_position),
                    u32s(first),
                    u32s(shape.heads),
                    u32s(shape.nope),
                    u32s(shape.rope),
                    u32s(shape.v),
                    u32s(shape.kv_lora),
                    shape.softmax_scale.into(),
                    Arg::Pointer(latents),
                    Arg::Pointer(expanded),
                    u32s(stride),
                    out.into(),
                ],
            )?;
        }
        Ok(())
    }
}
