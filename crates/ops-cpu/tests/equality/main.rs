#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The CPU backend equals the scalar reference bit for bit, on every instruction set that the machine has,
//! and its results do not depend on the batch, the threads or the places of pages.

mod attention;
mod data;
mod dense;
mod independence;
mod refusals;

use std::{io::Write, sync::OnceLock, time::Duration};

use cadre_ops_cpu::{CpuBackend, CpuOptions, Isa};
use cadre_types::NumericsClass;

/// Backends of a class: every available instruction set, with one and with three threads.
pub(crate) fn backends(class: NumericsClass) -> &'static [CpuBackend] {
    static BACKENDS: OnceLock<Vec<Vec<CpuBackend>>> = OnceLock::new();
    let all = BACKENDS.get_or_init(|| {
        NumericsClass::ALL.map(|class| available().flat_map(|isa| of_isa(class, isa)).collect()).into()
    });
    let index = NumericsClass::ALL.iter().position(|c| *c == class).unwrap();
    &all[index]
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| {
        if !isa.available() {
            // Past the test harness's capture: a suite that could not run must not look like one that did.
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "\n*** NOT RUN on {isa}: this machine does not have it ***\n");
        }
        isa.available()
    })
}

fn of_isa(class: NumericsClass, isa: Isa) -> impl Iterator<Item = CpuBackend> {
    [1, 3].into_iter().map(move |threads| {
        CpuBackend::new(CpuOptions {
            class,
            threads: Some(threads),
            isa: Some(isa),
            // Short, so that suites running side by side on few cores do not spin at each other.
            spin: Duration::from_micros(1),
        })
        .unwrap()
    })
}
