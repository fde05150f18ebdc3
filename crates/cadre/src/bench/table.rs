//! Figures as a table for people.

use std::fmt::Write;

use super::stats::Figures;

/// One row per number of streams.
pub(crate) fn render(figures: &[Figures]) -> String {
    let mut table = String::from(
        "streams  prompt  tokens   prefill tok/s   decode tok/s   TTFT ms p50/p99   inter-token ms p50/p99\n",
    );
    for row in figures {
        let decode = row.decode_tokens_per_second.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
        let gaps =
            row.inter_token_ms.map_or("-".to_owned(), |gap| format!("{:.2} / {:.2}", gap.p50, gap.p99));
        let ttft = format!("{:.1} / {:.1}", row.ttft_ms.p50, row.ttft_ms.p99);
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "{:>7} {:>7} {:>7} {:>15.1} {decode:>14} {ttft:>17} {gaps:>24}",
            row.streams, row.prompt_tokens, row.generated_tokens, row.prefill_tokens_per_second,
        );
    }
    table.truncate(table.trim_end().len());
    table
}
