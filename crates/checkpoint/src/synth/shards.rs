//! Cutting the table into shard files, and writing them.
//!
//! A shard is planned completely (header, offsets) before a byte is written; then bands of 128 rows,
//! the height of a scale block, are drawn, encoded and written at their offsets by several threads. A
//! matrix and its scales share a shard, because one band yields both.

use std::{
    fs::File,
    io,
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use cadre_numerics::{bf16, draw::Draw as Normals, e4m3};
use cadre_types::ModelConfig;
use serde_json::{Map, json};

use super::{Draw, SynthError};
use crate::{
    header::{Dtype, LENGTH_BYTES},
    table::{BLOCK, Content, TensorSpec, duplicate_of, table},
};

/// One shard, planned.
#[derive(Debug)]
pub(super) struct ShardPlan {
    file: String,
    header: Vec<u8>,
    tensors: Vec<Placed>,
    data_bytes: u64,
}

/// A tensor at its place.
#[derive(Debug)]
struct Placed {
    spec: TensorSpec,
    /// From the start of the file.
    offset: u64,
    /// Index of its scales in the same shard.
    scales: Option<usize>,
}

impl ShardPlan {
    pub(super) fn tensors(&self) -> usize {
        self.tensors.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.data_bytes
    }

    /// (tensor, file) of every tensor.
    pub(super) fn names(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tensors.iter().map(|placed| (placed.spec.name.as_str(), self.file.as_str()))
    }

    fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }
}

/// Cuts the table, in its order, into shards of at most `max_bytes`.
pub(super) fn plan(config: &ModelConfig, max_bytes: u64) -> Vec<ShardPlan> {
    let mut groups: Vec<Vec<TensorSpec>> = vec![Vec::new()];
    let mut filled = 0;
    let mut specs = table(config).peekable();
    while let Some(spec) = specs.next() {
        let scales = specs.next_if(TensorSpec::is_scale);
        let bytes = spec.published_bytes() + scales.as_ref().map_or(0, TensorSpec::published_bytes);
        if filled > 0 && filled + bytes > max_bytes {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(group) = groups.last_mut() {
            group.push(spec);
            group.extend(scales);
        }
    }
    let count = groups.len();
    let file = |at: usize| format!("model-{:05}-of-{count:06}.safetensors", at + 1);
    groups.into_iter().enumerate().map(|(at, specs)| plan_shard(file(at), specs)).collect()
}

fn plan_shard(file: String, mut specs: Vec<TensorSpec>) -> ShardPlan {
    // Wide elements first keeps every tensor aligned to its element; the format asks for no order.
    specs.sort_by_key(|spec| std::cmp::Reverse(spec.dtypes[0].bytes()));
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut ends = Vec::with_capacity(specs.len());
    let mut end = 0;
    for spec in &specs {
        let begin = end;
        end += spec.published_bytes();
        ends.push(begin);
        let dtype = spec.dtypes[0].name();
        let entry = json!({ "dtype": dtype, "shape": spec.shape, "data_offsets": [begin, end] });
        entries.insert(spec.name.clone(), entry);
    }
    let mut json = serde_json::Value::Object(entries).to_string().into_bytes();
    // Padding with blanks, which the format allows, aligns the data to 8 bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    debug_assert_eq!(header.len(), LENGTH_BYTES);
    header.extend(json);
    let scales_of: std::collections::HashMap<String, usize> = specs
        .iter()
        .enumerate()
        .filter(|(_, spec)| spec.is_scale())
        .map(|(at, spec)| (spec.name.clone(), at))
        .collect();
    let data_start = header.len() as u64;
    let place = |(spec, begin): (TensorSpec, u64)| {
        let scales = scales_of.get(&format!("{}{}", spec.name, crate::table::SCALE_SUFFIX)).copied();
        Placed { offset: data_start + begin, scales, spec }
    };
    let tensors = specs.into_iter().zip(ends).map(place).collect();
    ShardPlan { file, header, tensors, data_bytes: end }
}

/// Writes planned shards into a directory.
pub(super) struct Writer<'a> {
    dir: &'a Path,
    draw: &'a Draw,
    done: AtomicU64,
    total: u64,
    progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// 128 rows of a tensor (a vector is one row).
#[derive(Clone, Copy, Debug)]
struct Band {
    tensor: usize,
    first_row: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        dir: &'a Path,
        draw: &'a Draw,
        total: u64,
        progress: &'a (dyn Fn(u64, u64) + Sync),
    ) -> Self {
        Self { dir, draw, done: AtomicU64::new(0), total, progress }
    }

    /// The header and a hole.
    pub(super) fn holes(&self, plan: &ShardPlan) -> Result<(), SynthError> {
        self.create(plan).map(drop)
    }

    /// The header and random tensors.
    pub(super) fn random(&self, plan: &ShardPlan, threads: NonZeroUsize) -> Result<(), SynthError> {
        let file = self.create(plan)?;
        let bands = bands(plan);
        let next = AtomicUsize::new(0);
        let failure: Mutex<Option<io::Error>> = Mutex::new(None);
        let work = || {
            let mut buffers = Buffers::default();
            while let Some(&band) = bands.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.band(plan, &file, band, &mut buffers) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    // Nobody needs to start another band.
                    next.store(bands.len(), Ordering::Relaxed);
                }
            }
        };
        thread::scope(|scope| {
            (0..threads.get()).for_each(|_| {
                scope.spawn(work);
            });
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(source) => Err(self.failed("write", plan, source)),
        }
    }

    fn create(&self, plan: &ShardPlan) -> Result<File, SynthError> {
        let create = || -> io::Result<File> {
            let file = File::create_new(self.dir.join(&plan.file))?;
            file.set_len(plan.file_bytes())?;
            file.write_all_at(&plan.header, 0)?;
            Ok(file)
        };
        create().map_err(|source| self.failed("create", plan, source))
    }

    fn failed(&self, operation: &'static str, plan: &ShardPlan, source: io::Error) -> SynthError {
        SynthError::Io { operation, path: self.dir.join(&plan.file), source }
    }

    fn band(&self, plan: &ShardPlan, file: &File, band: Band, buffers: &mut Buffers) -> io::Result<()> {
        let placed = &plan.tensors[band.tensor];
        let (rows, cols) = rows_cols(&placed.spec);
        let count = BLOCK.min(rows - band.first_row);
        let Buffers { values, bytes, scales: scale_bytes } = buffers;
        values.resize(count * cols, 0.0);
        fill(self.draw, &placed.spec, (band.first_row * cols) as u64, cols, values);
        match placed.spec.dtypes[0] {
            Dtype::E4m3 => quantise(values, cols, bytes, scale_bytes),
            Dtype::Bf16 => encode(values, bytes, |value| bf16::encode(value).to_le_bytes()),
            _ => encode(values, bytes, f32::to_le_bytes),
        }
        let width = placed.spec.dtypes[0].bytes();
        let at = placed.offset + (band.first_row * cols * width) as u64;
        file.write_all_at(bytes, at)?;
        let mut written = bytes.len() as u64;
        if let Some(scales) = placed.scales {
            let row_bytes = (cols.div_ceil(BLOCK) * Dtype::F32.bytes()) as u64;
            let at = plan.tensors[scales].offset + (band.first_row / BLOCK) as u64 * row_bytes;
            file.write_all_at(scale_bytes, at)?;
            written += scale_bytes.len() as u64;
        }
        (self.progress)(self.done.fetch_add(written, Ordering::Relaxed) + written, self.total);
        Ok(())
    }
}

/// A vector counts as one row.
fn rows_cols(spec: &TensorSpec) -> (usize, usize) {
    match *spec.shape.as_slice() {
        [rows, cols] => (rows, cols),
        _ => (1, spec.shape.iter().product()),
    }
}

/// All bands of a shard; scales come with their matrices.
fn bands(plan: &ShardPlan) -> Vec<Band> {
    let of = |(tensor, placed): (usize, &Placed)| {
        let rows = if placed.spec.is_scale() { 0 } else { rows_cols(&placed.spec).0 };
        (0..rows).step_by(BLOCK).map(move |first_row| Band { tensor, first_row })
    };
    plan.tensors.iter().enumerate().flat_map(of).collect()
}

/// One thread's working memory: a band of the widest matrix so far.
#[derive(Default)]
struct Buffers {
    values: Vec<f32>,
    bytes: Vec<u8>,
    scales: Vec<u8>,
}

/// Draws the elements of a tensor from `start` on.
fn fill(draw: &Draw, spec: &TensorSpec, start: u64, cols: usize, values: &mut [f32]) {
    // A copy must be one.
    let stream = draw.stream(duplicate_of(spec).unwrap_or(&spec.name));
    match spec.content {
        Content::Norm => {
            Normals::normal(stream, 0.05).values(start, values);
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Content::Bias => {
            for (at, value) in (start..).zip(values) {
                *value = draw.bias(&stream, at);
            }
        }
        _ => Normals::normal(stream, (cols as f64).recip().sqrt()).values(start, values),
    }
}

fn encode<const N: usize>(values: &[f32], bytes: &mut Vec<u8>, code: impl Fn(f32) -> [u8; N]) {
    bytes.clear();
    bytes.reserve(values.len() * N);
    values.iter().for_each(|&value| bytes.extend_from_slice(&code(value)));
}

/// One row of blocks: a scale per 128 columns, codes of value / scale. Padding a ragged block with
/// zeros, as published, does not change its largest magnitude, so nothing is padded here.
fn quantise(values: &[f32], cols: usize, codes: &mut Vec<u8>, scales: &mut Vec<u8>) {
    scales.clear();
    codes.clear();
    codes.resize(values.len(), 0);
    for first in (0..cols).step_by(BLOCK) {
        let block = first..cols.min(first + BLOCK);
        let rows = || values.chunks_exact(cols).map(|row| &row[block.clone()]);
        let amax = rows().flatten().fold(0.0f32, |amax, value| amax.max(value.abs()));
        // A block of zeros has no scale of its own; any positive one says the same.
        let scale = if amax > 0.0 { amax / e4m3::MAX } else { 1.0 };
        scales.extend_from_slice(&scale.to_le_bytes());
        for (row, codes) in rows().zip(codes.chunks_exact_mut(cols)) {
            for (value, code) in row.iter().zip(&mut codes[block.clone()]) {
                *code = e4m3::encode(value / scale);
            }
        }
    }
}
