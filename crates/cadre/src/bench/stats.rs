//! What a run of parallel streams amounts to. Pure: times in, figures out.

use std::time::Duration;

use serde::Serialize;

/// When the tokens of one stream came, counted from the start of the run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Timeline {
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: usize,
    /// One entry per generated token, ascending.
    pub(crate) tokens: Vec<Duration>,
}

/// The figures of one run: all streams started together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figures {
    /// Streams at a time.
    pub(crate) streams: usize,
    /// Prompt tokens of each stream.
    pub(crate) prompt_tokens: usize,
    /// Generated tokens of each stream.
    pub(crate) generated_tokens: usize,
    /// Prompt tokens of all streams per second, until the last stream had its first token.
    pub(crate) prefill_tokens_per_second: f64,
    /// Tokens of all streams per second after that; absent if none came.
    pub(crate) decode_tokens_per_second: Option<f64>,
    /// Time to the first token.
    pub(crate) ttft_ms: Quantiles,
    /// Time between consecutive tokens of a stream; absent if none has two.
    pub(crate) inter_token_ms: Option<Quantiles>,
    /// The whole run.
    pub(crate) seconds: f64,
}

/// Two points of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    /// Median.
    pub(crate) p50: f64,
    /// 99th percentile.
    pub(crate) p99: f64,
}

impl Figures {
    /// The figures of several runs of one shape; rates are of the pooled times, so that a slow run counts
    /// by its length. `None` if a stream had no token.
    pub(crate) fn of(runs: &[Vec<Timeline>]) -> Option<Self> {
        let first = runs.first()?.first()?;
        let (mut prefill, mut decode, mut decoded) = (0.0, 0.0, 0_usize);
        let (mut ttft, mut gaps) = (Vec::new(), Vec::new());
        for run in runs {
            let firsts: Option<Vec<Duration>> =
                run.iter().map(|stream| stream.tokens.first().copied()).collect();
            let firsts = firsts?;
            let prompts_done = firsts.iter().max().copied()?;
            let end = run.iter().filter_map(|stream| stream.tokens.last()).max().copied()?;
            prefill += prompts_done.as_secs_f64();
            decode += end.saturating_sub(prompts_done).as_secs_f64();
            decoded += run.iter().flat_map(|stream| &stream.tokens).filter(|at| **at > prompts_done).count();
            ttft.extend(firsts);
            gaps.extend(run.iter().flat_map(|stream| stream.tokens.windows(2).map(|pair| pair[1] - pair[0])));
        }
        let streams = runs.first()?.len();
        let prompts: usize = runs.iter().flatten().map(|stream| stream.prompt_tokens).sum();
        Some(Self {
            streams,
            prompt_tokens: first.prompt_tokens,
            generated_tokens: first.tokens.len(),
            prefill_tokens_per_second: prompts as f64 / prefill,
            decode_tokens_per_second: (decoded > 0).then(|| decoded as f64 / decode),
            ttft_ms: quantiles(ttft)?,
            inter_token_ms: quantiles(gaps),
            seconds: prefill + decode,
        })
    }
}

/// Nearest-rank quantiles in milliseconds.
fn quantiles(mut values: Vec<Duration>) -> Option<Quantiles> {
    values.sort_unstable();
    let at = |share: f64| {
        let rank = (share * values.len() as f64).ceil() as usize;
        values.get(rank.saturating_sub(1)).map(|value| value.as_secs_f64() * 1e3)
    };
    Some(Quantiles { p50: at(0.50)?, p99: at(0.99)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(millis: &[u64]) -> Timeline {
        Timeline { prompt_tokens: 100, tokens: millis.iter().copied().map(Duration::from_millis).collect() }
    }

    #[test]
    fn one_stream() {
        let figures = Figures::of(&[vec![stream(&[500, 600, 700, 900])]]).expect("tokens came");
        assert_eq!(figures.prefill_tokens_per_second, 200.0);
        assert_eq!(figures.decode_tokens_per_second, Some(7.5));
        assert_eq!(figures.ttft_ms, Quantiles { p50: 500.0, p99: 500.0 });
        assert_eq!(figures.inter_token_ms, Some(Quantiles { p50: 100.0, p99: 200.0 }));
    }

    #[test]
    fn decoding_counts_from_the_moment_when_every_prompt_is_done() {
        // The first stream's tokens at 200 and 400 ms came while the second stream's prompt was computed.
        let run = vec![stream(&[200, 400, 600]), stream(&[500, 700, 900])];
        let figures = Figures::of(&[run]).expect("tokens came");
        assert_eq!(figures.prefill_tokens_per_second, 400.0);
        assert_eq!(figures.decode_tokens_per_second, Some(3.0 / 0.4));
    }

    #[test]
    fn prefill_alone_has_no_decode_rate() {
        let figures = Figures::of(&[vec![stream(&[250])], vec![stream(&[750])]]).expect("tokens came");
        assert_eq!(figures.prefill_tokens_per_second, 200.0);
        assert_eq!(figures.decode_tokens_per_second, None);
        assert_eq!(figures.inter_token_ms, None);
    }

    #[test]
    fn a_stream_without_a_token_makes_no_figures() {
        assert_eq!(Figures::of(&[vec![stream(&[])]]), None);
        assert_eq!(Figures::of(&[]), None);
    }
}
