//! The tensors of a directory, compactly: V3 has 92 thousand, and every process of a cluster holds this
//! table, the smallest expert shard too. Names and dimensions sit in one allocation each and rows in
//! another, sorted by name: 12 MB for V3, where a map of owned strings and shapes took five times that
//! and left the allocator's pages behind.

use std::ops::Range;

use crate::{
    header::{Dtype, HeaderEntry},
    listing::Shard,
};

/// Tensors by name, and the shards that hold them.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    shards: Vec<Shard>,
    names: String,
    dims: Vec<usize>,
    /// Sorted by name once [`Self::sort`] has run.
    rows: Vec<Row>,
}

/// One tensor; places in `names` and `dims`.
#[derive(Clone, Copy, Debug)]
struct Row {
    name: Place,
    shape: Place,
    shard: u32,
    dtype: Dtype,
    /// Whether the architecture has this tensor.
    known: bool,
    start: usize,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    start: usize,
    len: u32,
}

impl Place {
    /// The last `len` elements of a list of `end`. A header has at most 100 MB, so `len` fits.
    fn last(end: usize, len: usize) -> Self {
        Self { start: end - len, len: len as u32 }
    }

    fn range(self) -> Range<usize> {
        self.start..self.start + self.len as usize
    }
}

/// One tensor of the catalog.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) shard: &'a Shard,
    pub(crate) shape: &'a [usize],
    pub(crate) dtype: Dtype,
    row: &'a Row,
}

impl Catalog {
    /// Room for tensors, whose names have so many bytes together: growth would leave copies behind.
    pub(crate) fn with_capacity(tensors: usize, name_bytes: usize) -> Self {
        Self {
            shards: Vec::new(),
            names: String::with_capacity(name_bytes),
            // Matrices, nearly all.
            dims: Vec::with_capacity(2 * tensors),
            rows: Vec::with_capacity(tensors),
        }
    }

    /// Adds a shard; its tensors follow with [`Self::push`].
    pub(crate) fn push_shard(&mut self, shard: Shard) {
        self.shards.push(shard);
    }

    /// Adds a tensor of the shard that was added last.
    pub(crate) fn push(&mut self, entry: &HeaderEntry) {
        self.names.push_str(&entry.name);
        self.dims.extend_from_slice(&entry.shape);
        self.rows.push(Row {
            name: Place::last(self.names.len(), entry.name.len()),
            shape: Place::last(self.dims.len(), entry.shape.len()),
            // Shards are files of one directory.
            shard: self.shards.len().saturating_sub(1) as u32,
            dtype: entry.dtype,
            known: false,
            start: entry.range.start,
            len: entry.range.len(),
        });
    }

    /// Sorts by name, which the look-ups rely on.
    pub(crate) fn sort(&mut self) {
        let names = &self.names;
        self.rows.sort_unstable_by(|a, b| names[a.name.range()].cmp(&names[b.name.range()]));
        self.names.shrink_to_fit();
        self.dims.shrink_to_fit();
        self.rows.shrink_to_fit();
    }

    /// The shard files, by name.
    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The tensor of that name.
    pub(crate) fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.find(name).map(|at| self.tensor(&self.rows[at]))
    }

    /// The tensor of that name, if the architecture has it.
    pub(crate) fn get_known(&self, name: &str) -> Option<Tensor<'_>> {
        self.get(name).filter(|tensor| tensor.row.known)
    }

    /// Notes that the architecture has the tensor.
    pub(crate) fn mark_known(&mut self, name: &str) {
        if let Some(at) = self.find(name) {
            self.rows[at].known = true;
        }
    }

    /// Every tensor, by name.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.rows.iter().map(|row| self.tensor(row))
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.rows.binary_search_by(|row| self.names[row.name.range()].cmp(name)).ok()
    }

    fn tensor<'a>(&'a self, row: &'a Row) -> Tensor<'a> {
        Tensor {
            name: &self.names[row.name.range()],
            shard: &self.shards[row.shard as usize],
            shape: &self.dims[row.shape.range()],
            dtype: row.dtype,
            row,
        }
    }
}

impl<'a> Tensor<'a> {
    /// Whether the architecture has it.
    pub(crate) fn is_known(&self) -> bool {
        self.row.known
    }

    /// Its bytes' place in the file.
    pub(crate) fn range(&self) -> Range<usize> {
        self.row.start..self.row.start + self.row.len
    }

    /// Its bytes. The file must have its announced length, which opening a checkpoint makes sure of.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        &self.shard.mapping.bytes()[self.range()]
    }
}
