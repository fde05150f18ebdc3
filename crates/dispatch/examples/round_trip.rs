//! `cargo run --release -p cadre-dispatch --example round_trip [ITERATIONS [BYTES...]]`: the table of
//! `cadre bench dispatch` without the rest of cadre, for tuning the path.

use std::error::Error;

/// As the `cadre` binary has it: what a frame costs depends on the allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let mut numbers = std::env::args().skip(1).map(|number| number.parse::<usize>());
    let iterations = numbers.next().transpose()?.unwrap_or(2000);
    let mut payloads = numbers.collect::<Result<Vec<_>, _>>()?;
    if payloads.is_empty() {
        payloads = vec![7168, 2 * 7168, 32 * 7168, 256 * 7168];
    }
    let rows = cadre_dispatch::bench::dispatch_round_trip(&payloads, iterations, |_, _| {})?;
    eprintln!(
        "{:>9} {:>9} {:>9} {:>9} {:>9} {:>6}",
        "bytes", "p50 us", "p99 us", "raw p50", "raw p99", "ratio"
    );
    for row in rows {
        eprintln!(
            "{:>9} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>6.2}",
            row.payload_bytes,
            row.dispatch_p50,
            row.dispatch_p99,
            row.raw_p50,
            row.raw_p99,
            row.ratio()
        );
    }
    Ok(())
}
