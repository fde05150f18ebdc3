//! `cadre bench kernels`.

use std::{num::NonZeroUsize, thread::available_parallelism, time::Instant};

use anyhow::{Result, ensure};
use cadre_device::Device;
use cadre_ops_cpu::{
    Isa,
    measure::{Measurement, Rate, Roof, kernels},
};
use cadre_ops_cuda::measure::{self, Progress, Report};
use cadre_types::NumericsClass;
use clap::Args;
use serde_json::{Value, json};

use crate::output;

/// Measures the kernels beside the read bandwidth (and, of a processor, the FMA peak) of this machine.
#[derive(Args, Debug)]
pub(crate) struct KernelArgs {
    /// What to measure: cpu or cuda:N. [default: what the machine has]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Numerics class. [default: bf16; cuda-fp8 on a GPU, where no other is measured]
    #[arg(long, value_name = "CLASS")]
    numerics: Option<NumericsClass>,
    /// Thread counts of a processor, one table each. [default: 1 and all]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &KernelArgs) -> Result<()> {
    let device = args.device.unwrap_or_else(Device::of_machine);
    if let Device::Cuda(number) = device {
        return on_gpu(args, number);
    }
    let class = args.numerics.unwrap_or_default();
    let mut tables = Vec::new();
    for threads in args.thread_counts() {
        eprintln!("measuring with {threads} threads …");
        let (roof, rows) = kernels(class, threads.get())?;
        if args.json {
            tables.push(as_json(threads, &roof, &rows));
        } else {
            print(threads, &roof, &rows);
        }
    }
    if args.json {
        output::json(&json!({ "isa": Isa::best().name(), "numerics": class.name(), "tables": tables }))?;
    }
    Ok(())
}

fn on_gpu(args: &KernelArgs, number: u32) -> Result<()> {
    let class = args.numerics.unwrap_or(NumericsClass::CudaFp8);
    ensure!(
        class == NumericsClass::CudaFp8,
        "--numerics {class}: a GPU's kernels are measured in class cuda-fp8; the others are for comparing bits, and not tuned"
    );
    ensure!(args.threads.is_empty(), "--threads: a GPU has none to choose");
    let begun = Instant::now();
    let report = measure::kernels(number as usize, &mut |progress| {
        let at = begun.elapsed().as_secs_f64();
        match progress {
            Progress::Next(what) => eprintln!("{at:.1} s: measuring {what} …"),
            Progress::Figure(figure) => {
                eprintln!("{at:.1} s: {}, {}: {:.1} us", figure.name, figure.shape, figure.seconds * 1e6);
            }
        }
    })?;
    if args.json {
        return output::json(&gpu_as_json(&report));
    }
    let Report { device, read, figures } = report;
    output::line(&format!("{}: reads {:.2} TB/s", device.name, read / 1e12));
    output::line(
        "operation             shape                                     time us    TB/s of reads  TFLOP/s  launches us",
    );
    for figure in figures {
        let measure::Figure { name, shape, seconds, bytes, flop, parts } = figure;
        let rate = bytes / seconds;
        let parts: Vec<String> =
            parts.iter().map(|part| format!("{} {:.1}", part.kernel, part.seconds * 1e6)).collect();
        output::line(&format!(
            "{name:<21} {shape:<40} {:>9.1} {:>7.2} {:>4.0} % {:>10.0}  {}",
            seconds * 1e6,
            rate / 1e12,
            rate / read * 100.0,
            flop / seconds / 1e12,
            parts.join(", ")
        ));
    }
    Ok(())
}

fn gpu_as_json(report: &Report) -> Value {
    let figures: Vec<Value> = report
        .figures
        .iter()
        .map(|figure| {
            let parts: Vec<Value> = figure
                .parts
                .iter()
                .map(|part| json!({ "kernel": part.kernel, "seconds": part.seconds }))
                .collect();
            let rate = figure.bytes / figure.seconds;
            json!({
                "name": figure.name, "shape": figure.shape, "seconds": figure.seconds, "bytes": figure.bytes,
                "flop": figure.flop, "bytes_per_second": rate, "flop_per_second": figure.flop / figure.seconds,
                "fraction_of_read": rate / report.read, "launches": parts,
            })
        })
        .collect();
    json!({
        "device": report.device.name, "numerics": NumericsClass::CudaFp8.name(),
        "read_bytes_per_second": report.read, "kernels": figures,
    })
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
