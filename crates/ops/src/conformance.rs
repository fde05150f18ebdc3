//! The suite that a backend passes before anybody computes with it: every operation on random shapes against
//! the [`reference`](crate::reference), and what results may not depend on.
//!
//! A backend's tests call [`run`] with a [`Suite`]. Inside a numerics class results are equal bit for bit
//! ([`Tolerance::Bits`]); a class of another arithmetic states its distance from a reference class
//! ([`Tolerance::Distance`], the norm of the difference over the norm of the expected output). Independence
//! (a row alone = the row among many, chunks, pages, company) and operations that only move or encode values
//! are exact in every class. Cases are numbered; a failure names its case, and [`Suite::seed`] repeats it.
//!
//! No test harness and no generator crate is needed, so that the suite also runs from a plain binary on a
//! machine that has the device and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a conformance suite fails by panicking")]

mod alone;
mod attention;
mod data;
mod dense;
mod drawn;
mod experts;
mod independence;
mod published;
mod refusals;
mod rows;
mod sampling;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use crate::{backend::Backend, reference::ReferenceBackend};

pub use data::{Dtype, Matrix, Stream};

/// How near a computed value has to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tolerance {
    /// Equal bits.
    Bits,
    /// At most this norm of the difference, relative to the norm of what is expected; per output of a case.
    Distance(f32),
}

/// Widths of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Query heads.
    pub heads: usize,
    /// Query/key width without position.
    pub nope: usize,
    /// Rotary width.
    pub rope: usize,
    /// Value width.
    pub v: usize,
    /// Latent width.
    pub kv_lora: usize,
}

/// What is tested, against what.
#[derive(Clone, Debug)]
pub struct Suite<'a, B: Backend> {
    /// The backend.
    pub backend: &'a B,
    /// What its results are compared with.
    pub reference: ReferenceBackend,
    /// How near they have to be.
    pub tolerance: Tolerance,
    /// Random cases of every operation, beside the fixed ones.
    pub cases: usize,
    /// Where random cases begin.
    pub seed: u64,
    /// Every width of a matrix or a row is a multiple of this: 1 for a backend that takes all.
    pub granule: usize,
    /// Attention shapes that are tested; empty: any, drawn at random.
    pub attention: Vec<Widths>,
    /// The largest distance that a comparison found: what a bound stands beside.
    pub largest: Cell<f64>,
}

impl<'a, B: Backend> Suite<'a, B> {
    /// The suite of a backend that gives the bits of the reference of its class for all shapes.
    pub fn exact(backend: &'a B, cases: usize) -> Self {
        Self {
            backend,
            reference: ReferenceBackend::new(backend.class()),
            tolerance: Tolerance::Bits,
            cases,
            seed: 1,
            granule: 1,
            attention: Vec::new(),
            largest: Cell::new(0.0),
        }
    }

    /// Runs a case for each of the row counts that every backend meets (none, one, just below and above a tile
    /// of 32), then the random ones.
    fn each(&self, what: &str, mut case: impl FnMut(&mut Stream, usize)) {
        let fixed = [0, 1, 31, 33];
        for number in 0..fixed.len() + self.cases {
            let mut stream = Stream::new(self.seed.wrapping_add(number as u64));
            let rows = match fixed.get(number) {
                Some(rows) => *rows,
                // Mostly few, sometimes beyond a register tile, sometimes beyond a pass.
                None => match stream.below(8) {
                    0..4 => stream.below(8),
                    4..7 => 8 + stream.below(40),
                    _ => 195,
                },
            };
            self.named(&format!("{what}, case {number} of seed {}, {rows} rows", self.seed), || {
                case(&mut stream, rows);
            });
        }
    }

    /// Adds the name of what ran to a failure.
    fn named(&self, what: &str, f: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
            eprintln!("conformance: {what} failed on {}", self.backend.describe());
            resume_unwind(panic);
        }
    }

    /// A width from 1 on, in granules.
    fn width(&self, stream: &mut Stream, most: usize) -> usize {
        self.granule * (1 + stream.below(most.div_ceil(self.granule)))
    }

    /// Compares values that were computed.
    fn compare(&self, what: &str, got: &[f32], expected: &[f32], cols: usize) {
        assert_eq!(got.len(), expected.len(), "{what}: length");
        match self.tolerance {
            Tolerance::Bits => same_bits(what, got, expected, cols),
            Tolerance::Distance(bound) => {
                let square = |x: f64| x * x;
                let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
                let difference: f64 =
                    got.iter().zip(expected).map(|(g, e)| square(f64::from(*g) - f64::from(*e))).sum();
                let distance = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
                self.largest.set(self.largest.get().max(distance));
                // A NaN is beyond every bound.
                assert!(distance <= f64::from(bound), "{what}: distance {distance:e}, at most {bound:e}");
            }
        }
    }
}

/// Asserts equal bits and names the first difference.
pub fn same_bits(what: &str, got: &[f32], expected: &[f32], cols: usize) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    if let Some(i) = (0..got.len()).find(|i| got[*i].to_bits() != expected[*i].to_bits()) {
        let (row, col) = (i / cols.max(1), i % cols.max(1));
        panic!("{what}: row {row} column {col}: {:?} is not {:?}", got[i], expected[i]);
    }
}

/// A part of the suite.
pub type Part<'a, B> = fn(&Suite<'a, B>);

/// Every part by name, for a harness that reports them one by one.
pub fn parts<'a, B: Backend>() -> Vec<(&'static str, Part<'a, B>)> {
    vec![
        ("embed", dense::embed),
        ("linear and logits", dense::linear),
        ("linear with many outputs", dense::many_outputs),
        ("huge and tiny inputs", dense::huge_and_tiny),
        ("norms", dense::norms),
        ("feed-forward", dense::feed_forward),
        ("drawn weights", drawn::weights),
        ("row moves", rows::moves),
        ("transfers", rows::transfers),
        ("staging and events", rows::staging),
        ("gate", experts::gate),
        ("gate refuses NaN", experts::nan_gate),
        ("encode", experts::encode),
        ("experts", experts::grouped),
        ("experts, whole blocks", experts::whole_blocks),
        ("combine", experts::combine),
        ("attention", attention::forms),
        ("a long chunk", attention::long_chunk),
        ("hand-off of cached rows", attention::handed_over),
        ("samples", sampling::draws),
        ("samples of bad rows", sampling::bad_rows),
        ("a row alone", independence::dense_rows),
        ("an expert's row alone", independence::expert_rows),
        ("embedding, norms, encoding: a row alone", alone::rows),
        ("gate, combine: a row alone", alone::routed),
        ("cached rows and queries: a row alone", alone::cached),
        ("samples: a row alone", alone::tokens),
        ("chunks of a prompt", independence::chunks),
        ("company and pages", independence::company),
        ("refusals", refusals::alike),
        ("empty batches", refusals::empty),
    ]
}

/// Parts on the shapes of published checkpoints: seconds each on the reference, so apart from [`parts`].
pub fn published_parts<'a, B: Backend>() -> Vec<(&'static str, Part<'a, B>)> {
    vec![
        ("published shapes: products", published::products),
        ("published shapes: experts", published::blocks),
        ("published shapes: gate", published::gates),
        ("published shapes: attention", published::heads),
    ]
}

/// Runs [`parts`].
pub fn run<B: Backend>(suite: &Suite<'_, B>) {
    for (name, part) in parts() {
        suite.named(name, || part(suite));
    }
}
