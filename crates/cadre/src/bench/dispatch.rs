//! `cadre bench dispatch`.

use anyhow::Result;
use cadre_dispatch::bench::{RoundTripRow, dispatch_round_trip};
use clap::Args;
use serde_json::json;

use crate::{output, progress};

/// Measures the round trip of the dispatch path beside a raw framed-TCP echo of the same bytes.
#[derive(Args, Debug)]
pub(crate) struct DispatchArgs {
    /// Bytes each way; 7168 is one token of V3 in fp8, 229376 is 32 of them.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "7168,28672,229376,1835008")]
    payloads: Vec<usize>,
    /// Exchanges of each kind and payload.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    iterations: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &DispatchArgs) -> Result<()> {
    let bar = progress::steps("round trips", 0);
    let rows = dispatch_round_trip(&args.payloads, args.iterations, |done, total| {
        progress::set(&bar, done as u64, total as u64);
    })?;
    bar.finish_and_clear();
    if args.json {
        let rows: Vec<_> = rows.iter().map(as_json).collect();
        return output::json(&json!({ "dispatch": rows }));
    }
    output::line("    bytes   dispatch us p50/p99    raw TCP us p50/p99   ratio of p50");
    for row in &rows {
        output::line(&format!(
            "{:>9}   {:>9.1} / {:>7.1}   {:>9.1} / {:>7.1}   {:>12.2}",
            row.payload_bytes,
            row.dispatch_p50,
            row.dispatch_p99,
            row.raw_p50,
            row.raw_p99,
            row.ratio()
        ));
    }
    Ok(())
}

fn as_json(row: &RoundTripRow) -> serde_json::Value {
    json!({
        "payload_bytes": row.payload_bytes,
        "dispatch_us": {"p50": row.dispatch_p50, "p99": row.dispatch_p99},
        "raw_tcp_us": {"p50": row.raw_p50, "p99": row.raw_p99},
        "ratio_of_p50": row.ratio(),
    })
}
