//! What stays on the device: packed matrices, vectors, rotary tables, and how they get there.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use cadre_numerics::{BLOCK, draw::Draw, quant, rope};
use cadre_ops::{
    AttentionShape, DrawnElements, DrawnMatrix, ElementType, Ffn, HostMatrix, MatrixData, OpsError, check,
    check::Dims,
};
use cadre_types::config::ScaleFormat;

use super::tensor;
use crate::{
    device::{Device, Memory, Pinned, Stream},
    error::CudaError,
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Bytes that go to the device at a time: long enough that a copy runs at the link's speed.
const CHUNK: usize = 16 << 20;

/// A matrix, or two stacked ones, in panels (kernels/product.cu) or in tiles (kernels/pack.cu).
#[derive(Debug)]
pub struct Weight {
    pub(crate) dims: Dims,
    pub(crate) elements: ElementType,
    pub(crate) tiles: bool,
    pub(crate) words: Memory,
    /// e4m3 only, by panel and block of columns.
    pub(crate) scales: Option<Memory>,
    /// Scales of a quantised input.
    pub(crate) input_scales: ScaleFormat,
}

/// F32 values on the device.
#[derive(Debug)]
pub struct Vector {
    pub(crate) memory: Memory,
    pub(crate) len: usize,
}

/// kv_b in the forms that its attention needs.
#[derive(Debug)]
pub struct KvUp {
    pub(crate) dims: Dims,
    /// For CUDA cores.
    pub(crate) plain: Option<PlainKvUp>,
    /// For tensor cores.
    pub(crate) tiles: Option<TiledKvUp>,
}

/// kv_b in panels, and as stored.
#[derive(Debug)]
pub(crate) struct PlainKvUp {
    pub(crate) packed: Weight,
    pub(crate) stored: Memory,
}

/// kv_b in BF16 tiles.
#[derive(Debug)]
pub(crate) struct TiledKvUp {
    /// Per head key tiles, then value tiles.
    pub(crate) keys_values: Memory,
    /// Per head W_UK transposed.
    pub(crate) absorb: Memory,
}

/// An attention shape, and cos and sin by position and pair.
#[derive(Debug)]
pub struct Attention {
    pub(crate) shape: AttentionShape,
    pub(crate) angles: Memory,
}

/// Bytes of an element.
pub(crate) fn element_bytes(elements: ElementType) -> usize {
    match elements {
        ElementType::F32 => 4,
        ElementType::Bf16 => 2,
        ElementType::E4m3 => 1,
    }
}

/// Bytes of the panels of a matrix.
pub(crate) fn panel_bytes(op: &'static str, dims: Dims, elements: ElementType) -> Result<usize, OpsError> {
    let words = dims.cols.div_ceil(4 / element_bytes(elements));
    check::product(op, check::product(op, dims.rows.div_ceil(BLOCK) * BLOCK, words)?, 4)
}

/// Bytes of its scales.
pub(crate) fn scale_bytes(dims: Dims, elements: ElementType) -> usize {
    match elements {
        ElementType::E4m3 => quant::blocks(dims.rows) * quant::blocks(dims.cols) * 4,
        ElementType::F32 | ElementType::Bf16 => 0,
    }
}

/// First row of up_proj in a stacked matrix: a panel begins there.
pub(crate) fn up_row(inner: usize) -> usize {
    inner.next_multiple_of(BLOCK)
}

/// A checked matrix, wherever its elements come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    dims: Dims,
    elements: ElementType,
    raw: Raw<'a>,
    scales: &'a [f32],
    input_scales: ScaleFormat,
}

/// Row-major elements.
#[derive(Clone, Copy, Debug)]
enum Raw<'a> {
    /// In host memory.
    Bytes(&'a [u8]),
    /// Drawn on the device.
    Drawn(Draw),
}

impl<'a> From<&HostMatrix<'a>> for Source<'a> {
    fn from(matrix: &HostMatrix<'a>) -> Self {
        let (raw, scales, input_scales): (&[u8], &[f32], _) = match matrix.data {
            MatrixData::F32(bytes) | MatrixData::Bf16(bytes) => (bytes, &[], ScaleFormat::F32),
            MatrixData::E4m3 { codes, scales, input_scales, .. } => (codes, scales, input_scales),
        };
        let dims = Dims { rows: matrix.rows, cols: matrix.cols };
        Self { dims, elements: matrix.data.element_type(), raw: Raw::Bytes(raw), scales, input_scales }
    }
}

impl<'a> From<&DrawnMatrix<'a>> for Source<'a> {
    fn from(matrix: &DrawnMatrix<'a>) -> Self {
        let (scales, input_scales): (&[f32], _) = match matrix.elements {
            DrawnElements::F32 | DrawnElements::Bf16 => (&[], ScaleFormat::F32),
            DrawnElements::E4m3 { scales, input_scales } => (scales, input_scales),
        };
        let dims = Dims { rows: matrix.rows, cols: matrix.cols };
        Self { dims, elements: matrix.element_type(), raw: Raw::Drawn(matrix.draw), scales, input_scales }
    }
}

impl Source<'_> {
    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        self.dims.cols * element_bytes(self.elements)
    }

    fn bytes(&self) -> usize {
        self.dims.rows * self.row_bytes()
    }

    /// Its bytes from 0 on in pieces of `at_once`.
    fn pieces(&self, at_once: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let bytes = self.bytes();
        (0..bytes).step_by(at_once.max(1)).map(move |at| at..bytes.min(at + at_once))
    }
}

/// Brings weights to the device, one caller at a time.
#[derive(Debug)]
pub(crate) struct Loader {
    device: Arc<Device>,
    /// Whether matrices go to tensor cores where they can.
    tensor: bool,
    lane: Mutex<Lane>,
}

#[derive(Debug)]
struct Lane {
    stream: Stream,
    host: Pinned,
    raw: Memory,
}

impl Loader {
    pub(crate) fn new(device: &Arc<Device>, tensor: bool) -> Result<Self, CudaError> {
        let lane = Lane {
            stream: Stream::new(device)?,
            host: Pinned::new(device, "loader", CHUNK)?,
            raw: Memory::new(device, "loader", CHUNK)?,
        };
        Ok(Self { device: device.clone(), tensor, lane: Mutex::new(lane) })
    }

    /// A checked matrix in panels.
    pub(crate) fn matrix(&self, op: &'static str, matrix: Source<'_>) -> Result<Weight, OpsError> {
        if self.tensor && tensor::covers_matrix(matrix.dims, matrix.elements) {
            return self.tiles(op, matrix);
        }
        self.panels(op, &[matrix])
    }

    /// A matrix in tiles.
    fn tiles(&self, op: &'static str, matrix: Source<'_>) -> Result<Weight, OpsError> {
        let Source { dims, elements, scales, input_scales, .. } = matrix;
        let words = Memory::new(&self.device, op, tensor::matrix_bytes(op, dims, elements)?)?;
        let row_bytes = matrix.row_bytes();
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        lane.room(op, 128 * row_bytes)?;
        let rows_at_once = lane.raw.bytes() / (128 * row_bytes) * 128;
        for (i, piece) in matrix.pieces(rows_at_once * row_bytes).enumerate() {
            let rows = piece.len() / row_bytes;
            lane.bring(op, 0, &matrix, piece)?;
            let before = Dims { rows: i * rows_at_once, cols: dims.cols };
            let to = words.at(tensor::matrix_bytes(op, before, elements)?);
            let raw = Arg::Pointer(lane.raw.address());
            let (n, k) = (Arg::U32(rows as u32), Arg::U32(dims.cols as u32));
            if elements == ElementType::E4m3 {
                let args = [raw, Arg::U64(row_bytes as u64), Arg::Pointer(to), n, k];
                lane.stream.launch(Kernel::PackFp8, PACK, &args)?;
            } else {
                let none = Arg::U64(0);
                let args = [
                    raw,
                    Arg::U64(dims.cols as u64),
                    none,
                    Arg::Pointer(to),
                    none,
                    Arg::U32(1),
                    n,
                    k,
                    Arg::U32(0),
                ];
                lane.stream.launch(Kernel::PackBf16, PACK, &args)?;
            }
            lane.stream.synchronize(op)?;
        }
        let scales = lane.scales(op, &self.device, &[scales])?;
        Ok(Weight { dims, elements, tiles: true, words, scales, input_scales })
    }

    /// gate and up in common tiles.
    fn gate_up_tiles(&self, op: &'static str, gate: Source<'_>, up: Source<'_>) -> Result<Weight, OpsError> {
        let Source { dims: Dims { rows: inner, cols: hidden }, elements, input_scales, .. } = gate;
        let words = Memory::new(&self.device, op, tensor::gate_up_bytes(op, inner, hidden, elements)?)?;
        let row_bytes = gate.row_bytes();
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        lane.room(op, 2 * 64 * row_bytes)?;
        let rows_at_once = lane.raw.bytes() / (2 * 64 * row_bytes) * 64;
        let second = rows_at_once * row_bytes;
        for (i, piece) in gate.pieces(second).enumerate() {
            let rows = piece.len() / row_bytes;
            lane.bring(op, 0, &gate, piece.clone())?;
            lane.bring(op, second, &up, piece)?;
            let to = words.at(tensor::gate_up_bytes(op, i * rows_at_once, hidden, elements)?);
            let kernel =
                if elements == ElementType::E4m3 { Kernel::PackGateUpFp8 } else { Kernel::PackGateUpBf16 };
            let args = [
                Arg::Pointer(lane.raw.address()),
                Arg::Pointer(lane.raw.at(second)),
                Arg::Pointer(to),
                Arg::U32(rows as u32),
                Arg::U32(hidden as u32),
            ];
            lane.stream.launch(kernel, PACK, &args)?;
            lane.stream.synchronize(op)?;
        }
        let dims = Dims { rows: up_row(inner) + inner, cols: hidden };
        let scales = lane.scales(op, &self.device, &[gate.scales, up.scales])?;
        Ok(Weight { dims, elements, tiles: true, words, scales, input_scales })
    }

    /// gate, up and down, checked; gate above up.
    pub(crate) fn ffn(
        &self,
        op: &'static str,
        gate: Source<'_>,
        up: Source<'_>,
        down: Source<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        let inner = gate.dims.rows;
        let gate_up = if self.tensor && tensor::covers_matrix(gate.dims, gate.elements) {
            self.gate_up_tiles(op, gate, up)?
        } else {
            self.panels(op, &[gate, up])?
        };
        Ok(Ffn { gate_up, down: self.matrix(op, down)?, inner })
    }

    /// Matrices of one width and element type above each other, each from a panel on.
    fn panels(&self, op: &'static str, parts: &[Source<'_>]) -> Result<Weight, OpsError> {
        let (first, last) = (parts[0], parts[parts.len() - 1]);
        let padded: usize = parts[..parts.len() - 1].iter().map(|part| up_row(part.dims.rows)).sum();
        let dims = Dims { rows: padded + last.dims.rows, cols: first.dims.cols };
        let elements = first.elements;
        let words = Memory::new(&self.device, op, panel_bytes(op, dims, elements)?)?;
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        let mut panel_at = words.address();
        for part in parts {
            lane.pack(op, part, panel_at)?;
            panel_at += panel_bytes(op, part.dims, elements)? as u64;
        }
        let scales: Vec<&[f32]> = parts.iter().map(|part| part.scales).collect();
        let scales = lane.scales(op, &self.device, &scales)?;
        Ok(Weight { dims, elements, tiles: false, words, scales, input_scales: first.input_scales })
    }

    /// Values as they are.
    pub(crate) fn vector(&self, op: &'static str, values: &[f32]) -> Result<Vector, OpsError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Vector { memory: self.bytes(op, &bytes)?, len: values.len() })
    }

    /// Bytes as they are.
    pub(crate) fn bytes(&self, op: &'static str, bytes: &[u8]) -> Result<Memory, OpsError> {
        let memory = Memory::new(&self.device, op, bytes.len())?;
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        lane.copy(op, bytes, memory.address())?;
        Ok(memory)
    }

    /// Elements as a checkpoint stores them.
    fn stored(&self, op: &'static str, matrix: Source<'_>) -> Result<Memory, OpsError> {
        let memory = Memory::new(&self.device, op, matrix.bytes())?;
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        match matrix.raw {
            Raw::Bytes(bytes) => lane.copy(op, bytes, memory.address())?,
            Raw::Drawn(draw) => {
                lane.draw(draw, matrix.elements, 0..matrix.bytes(), memory.address())?;
                lane.stream.synchronize(op)?;
            }
        }
        Ok(memory)
    }

    /// kv_b, checked.
    pub(crate) fn kv_up(
        &self,
        op: &'static str,
        shape: &AttentionShape,
        kv_b: Source<'_>,
    ) -> Result<KvUp, OpsError> {
        let dims = kv_b.dims;
        if self.tensor && tensor::covers_attention(shape) && kv_b.elements != ElementType::F32 {
            return Ok(KvUp { dims, plain: None, tiles: Some(self.kv_up_tiles(op, shape, kv_b)?) });
        }
        let plain = PlainKvUp { packed: self.panels(op, &[kv_b])?, stored: self.stored(op, kv_b)? };
        Ok(KvUp { dims, plain: Some(plain), tiles: None })
    }

    fn kv_up_tiles(
        &self,
        op: &'static str,
        shape: &AttentionShape,
        kv_b: Source<'_>,
    ) -> Result<TiledKvUp, OpsError> {
        let stored = self.stored(op, kv_b)?;
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        let u32s = |value: usize| Arg::U32(value as u32);
        let source = if kv_b.elements == ElementType::E4m3 {
            let scales = lane.scales(op, &self.device, &[kv_b.scales])?;
            let out = Memory::new(&self.device, op, kv_b.dims.rows * kv_b.dims.cols * 2)?;
            let scales = Arg::Pointer(scales.as_ref().map_or(0, Memory::address));
            let args = [(&stored).into(), scales, (&out).into(), u32s(kv_b.dims.rows), u32s(kv_b.dims.cols)];
            lane.stream.launch(Kernel::DequantFp8, PACK, &args)?;
            lane.stream.synchronize(op)?;
            out
        } else {
            stored
        };
        let sizes = tensor::KvUpTiles::of(shape);
        let (nope, kv_lora, heads) = (shape.nope, shape.kv_lora, shape.heads);
        let keys_values = Memory::new(&self.device, op, heads * sizes.head)?;
        let absorb = Memory::new(&self.device, op, heads * sizes.absorb)?;
        let pack = |from: u64, to: u64, to_group: usize, n: usize, k: usize, transpose: u32| {
            let args = [
                Arg::Pointer(from),
                Arg::U64(kv_lora as u64),
                Arg::U64((2 * nope * kv_lora) as u64),
                Arg::Pointer(to),
                Arg::U64(to_group as u64),
                u32s(heads),
                u32s(n),
                u32s(k),
                Arg::U32(transpose),
            ];
            lane.stream.launch(Kernel::PackBf16, PACK, &args)
        };
        let from = source.address();
        pack(from, keys_values.address(), sizes.head, nope, kv_lora, 0)?;
        pack(source.at(nope * kv_lora * 2), keys_values.at(sizes.keys), sizes.head, nope, kv_lora, 0)?;
        pack(from, absorb.address(), sizes.absorb, kv_lora, nope, 1)?;
        lane.stream.synchronize(op)?;
        Ok(TiledKvUp { keys_values, absorb })
    }

    /// The rotary table of a shape, checked.
    pub(crate) fn attention(&self, op: &'static str, shape: &AttentionShape) -> Result<Attention, OpsError> {
        let entries = check::product(op, shape.max_positions, shape.inv_freq.len())?;
        let mut table = Vec::with_capacity(entries * 8);
        for position in 0..shape.max_positions {
            for inv_freq in &shape.inv_freq {
                let (cos, sin) = rope::table_entry(position as u32, *inv_freq, shape.rope_magnitude);
                table.extend_from_slice(&cos.to_le_bytes());
                table.extend_from_slice(&sin.to_le_bytes());
            }
        }
        Ok(Attention { shape: shape.clone(), angles: self.bytes(op, &table)? })
    }
}

/// Packing kernels take as many blocks as they are given.
const PACK: Grid = Grid { blocks: (2048, 1), threads: 256, shared: 0 };

impl Lane {
    /// Makes room for pieces of so many bytes.
    fn room(&mut self, op: &'static str, bytes: usize) -> Result<(), OpsError> {
        if bytes > self.raw.bytes() {
            self.host = Pinned::new(self.stream.device(), op, bytes)?;
            self.raw = Memory::new(self.stream.device(), op, bytes)?;
        }
        Ok(())
    }

    /// Puts a piece of a matrix at a byte of the raw memory.
    fn bring(
        &mut self,
        op: &'static str,
        at: usize,
        matrix: &Source<'_>,
        piece: Range<usize>,
    ) -> Result<(), OpsError> {
        match matrix.raw {
            Raw::Bytes(bytes) => {
                let to = at..at + piece.len();
                self.host.as_mut_slice()[to.clone()].copy_from_slice(&bytes[piece]);
                Ok(self.stream.upload(op, &self.host.as_slice()[to], self.raw.at(at))?)
            }
            Raw::Drawn(draw) => self.draw(draw, matrix.elements, piece, self.raw.at(at)),
        }
    }

    /// Draws the elements of these bytes of a matrix.
    fn draw(&self, draw: Draw, elements: ElementType, bytes: Range<usize>, to: u64) -> Result<(), OpsError> {
        let width = element_bytes(elements);
        let args = [
            Arg::U64(draw.stream.key),
            Arg::U64((bytes.start / width) as u64),
            Arg::U64((bytes.len() / width) as u64),
            Arg::F32(draw.factor),
            Arg::U32(width as u32),
            Arg::Pointer(to),
        ];
        Ok(self.stream.launch(Kernel::Draw, PACK, &args)?)
    }

    /// Scales of matrices above each other, if there are any; done when it returns.
    fn scales(
        &mut self,
        op: &'static str,
        device: &Arc<Device>,
        parts: &[&[f32]],
    ) -> Result<Option<Memory>, OpsError> {
        let bytes: Vec<u8> =
            parts.iter().flat_map(|part| part.iter()).flat_map(|scale| scale.to_le_bytes()).collect();
        if bytes.is_empty() {
            return Ok(None);
        }
        let memory = Memory::new(device, op, bytes.len())?;
        self.copy(op, &bytes, memory.address())?;
        Ok(Some(memory))
    }

    /// Copies bytes to the device in chunks; done when it returns.
    fn copy(&mut self, op: &'static str, bytes: &[u8], to: u64) -> Result<(), OpsError> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            self.host.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
            self.stream.upload(op, &self.host.as_slice()[..chunk.len()], to + (i * CHUNK) as u64)?;
            self.stream.synchronize(op)?;
        }
        Ok(())
    }

    /// Packs a row-major matrix, whole panels at a time; done when it returns.
    fn pack(&mut self, op: &'static str, matrix: &Source<'_>, to: u64) -> Result<(), OpsError> {
        let Source { dims, elements, .. } = *matrix;
        if dims.rows == 0 || dims.cols == 0 {
            return Ok(());
        }
        let row_bytes = matrix.row_bytes();
        let panel = BLOCK * row_bytes;
        self.room(op, panel)?;
        let rows_at_once = self.raw.bytes() / panel * BLOCK;
        let panel_out = panel_bytes(op, Dims { rows: BLOCK, cols: dims.cols }, elements)?;
        for (i, piece) in matrix.pieces(rows_at_once * row_bytes).enumerate() {
            let rows = piece.len() / row_bytes;
            self.bring(op, 0, matrix, piece)?;
            let words = dims.cols.div_ceil(4 / element_bytes(elements));
            let out = to + (i * (rows_at_once / BLOCK) * panel_out) as u64;
            self.stream.launch(
                Kernel::Pack,
                Grid::of(words, BLOCK as u32).by(rows.div_ceil(BLOCK)),
                &[
                    Arg::from(&self.raw),
                    Arg::U32(rows as u32),
                    Arg::U32(dims.cols as u32),
                    Arg::U32(element_bytes(elements) as u32),
                    Arg::Pointer(out),
                ],
            )?;
            self.stream.synchronize(op)?;
        }
        Ok(())
    }
}
