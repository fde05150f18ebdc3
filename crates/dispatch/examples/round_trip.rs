//! `cargo run --release -p cadre-dispatch --example round_trip`: the table of `cadre bench dispatch`
//! without the rest of cadre, for tuning the path.

fn main() -> Result<(), cadre_dispatch::bench::BenchError> {
    let payloads = [7168, 2 * 7168, 32 * 7168, 256 * 7168];
    let rows = cadre_dispatch::bench::dispatch_round_trip(&payloads, 2000, |_, _| {})?;
    eprintln!("{:>9} {:>9} {:>9} {:>9} {:>9} {:>6}", "bytes", "p50 us", "p99 us", "raw p50", "raw p99", "ratio");
    for row in rows {
        eprintln!(
            "{:>9} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>6.2}",
            row.payload_bytes, row.dispatch_p50, row.dispatch_p99, row.raw_p50, row.raw_p99, row.ratio()
        );
    }
    Ok(())
}
