//! `cadre bench kernels`.

use std::{num::NonZeroUsize, thread::available_parallelism};

use anyhow::{Result, bail};
use cadre_device::Device;
use cadre_ops_cpu::{
    Isa,
    measure::{Measurement, Rate, Roof, kernels},
};
use cadre_types::NumericsClass;
use clap::Args;
use serde_json::{Value, json};

use crate::output;

/// Measures the kernels beside the read bandwidth and the FMA peak of this machine.
#[derive(Args, Debug)]
pub(crate) struct KernelArgs {
    /// What to measure: cpu or cuda:N. [default: what the machine has]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Numerics class.
    #[arg(long, value_name = "CLASS", default_value_t = NumericsClass::Bf16)]
    numerics: NumericsClass,
    /// Thread counts, one table each. [default: 1 and all]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &KernelArgs) -> Result<()> {
    let device = args.device.unwrap_or_else(Device::of_machine);
    if let Device::Cuda(_) = device {
        bail!("bench kernels measures processors; {device} is measured by tests/gpu/run.sh (docs/gpu.md)");
    }
    let mut tables = Vec::new();
    for threads in args.thread_counts() {
        eprintln!("measuring with {threads} threads …");
        let (roof, rows) = kernels(args.numerics, threads.get())?;
        if args.json {
            tables.push(as_json(threads, &roof, &rows));
        } else {
            print(threads, &roof, &rows);
        }
    }
    if args.json {
        output::json(
            &json!({ "isa": Isa::best().name(), "numerics": args.numerics.name(), "tables": tables }),
        )?;
    }
    Ok(())
}

impl KernelArgs {
    fn thread_counts(&self) -> Vec<NonZeroUsize> {
        if !self.threads.is_empty() {
            return self.threads.clone();
        }
        let all = available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let mut counts = vec![NonZeroUsize::MIN, all];
        counts.dedup();
        counts
    }
}

fn print(threads: NonZeroUsize, roof: &Roof, rows: &[Measurement]) {
    output::line(&format!(
        "{threads} threads, {}: reads {:.1} GB/s, FMA {:.1} GFLOP/s",
        Isa::best(),
        roof.read / 1e9,
        roof.flop / 1e9
    ));
    output::line(
        "operation            shape                                          time us        rate         of roof",
    );
    for row in rows {
        let rate = match row.rate {
            Rate::BytesPerSecond(rate) => format!("{:.1} GB/s", rate / 1e9),
            Rate::FlopPerSecond(rate) => format!("{:.1} GFLOP/s", rate / 1e9),
        };
        output::line(&format!(
            "{:<20} {:<44} {:>9.1} {rate:>16} {:>9.0} %",
            row.name,
            row.shape,
            row.seconds * 1e6,
            row.fraction * 100.0
        ));
    }
}

fn as_json(threads: NonZeroUsize, roof: &Roof, rows: &[Measurement]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let (unit, rate) = match row.rate {
                Rate::BytesPerSecond(rate) => ("bytes_per_second", rate),
                Rate::FlopPerSecond(rate) => ("flop_per_second", rate),
            };
            json!({
                "name": row.name, "shape": row.shape, "seconds": row.seconds, unit: rate,
                "fraction_of_roof": row.fraction,
            })
        })
        .collect();
    json!({
        "threads": threads, "read_bytes_per_second": roof.read, "fma_flop_per_second": roof.flop, "kernels": rows,
    })
}
