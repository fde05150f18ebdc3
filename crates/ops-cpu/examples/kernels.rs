//! Prints what the machine and the kernels do: `cargo run --release -p cadre-ops-cpu --example kernels -- 1 2`.
#![allow(clippy::print_stdout, reason = "the example's output")]

use cadre_ops_cpu::measure::{Rate, kernels};
use cadre_types::NumericsClass;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut class = NumericsClass::Bf16;
    let mut threads = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.parse() {
            Ok(count) => threads.push(count),
            Err(_) => class = argument.parse()?,
        }
    }
    for threads in threads {
        let (roof, rows) = kernels(class, threads)?;
        let (read, flop) = (roof.read / 1e9, roof.flop / 1e9);
        println!("{threads} threads, {class}: {read:.1} GB/s of reads, {flop:.0} GFLOP/s of FMA");
        for row in rows {
            let (rate, unit) = match row.rate {
                Rate::BytesPerSecond(rate) => (rate / 1e9, "GB/s"),
                Rate::FlopPerSecond(rate) => (rate / 1e9, "GFLOP/s"),
            };
            println!(
                "{:20} {:40} {:10.1} us {rate:8.1} {unit:8} {:4.0} %",
                row.name,
                row.shape,
                row.seconds * 1e6,
                row.fraction * 100.0,
            );
        }
    }
    Ok(())
}
