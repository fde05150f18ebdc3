//! The same load on whatever generates: a cluster behind gRPC or one engine in this process.

use std::{future::Future, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use tokio::task::JoinSet;

use super::{
    slow::Slow,
    stats::{Figures, Timeline},
};

/// Something that generates from token ids.
pub(crate) trait Target: Send + Sync + 'static {
    /// Generates exactly `generate` tokens greedily, whatever EOS says, calling `on_token` as each arrives.
    fn generate(
        &self,
        prompt: Vec<u32>,
        generate: u32,
        on_token: impl FnMut() + Send,
    ) -> impl Future<Output = Result<()>> + Send;
}

/// Sizes of a load.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Prompt tokens of each stream.
    pub(crate) prompt: usize,
    /// Tokens to generate in each stream.
    pub(crate) generate: u32,
    /// Runs that count; one more before them warms up.
    pub(crate) repeat: usize,
    /// Prompt tokens are drawn below this id.
    pub(crate) max_token_id: u32,
}

/// Prompts of the runs with a slow shard are those of turns that no other run has.
const SLOWED_TURNS: usize = 1 << 16;

/// Ids below are special tokens in most vocabularies.
const FIRST_TOKEN_ID: u32 = 16;

/// Runs the load with so many streams at a time; after each run that is not disturbed another one, of other prompts,
/// with a slow shard, if there is to be one.
pub(crate) async fn run<T: Target>(
    target: &Arc<T>,
    shape: &Shape,
    streams: usize,
    slow: Option<&Slow>,
    bar: &ProgressBar,
) -> Result<(Figures, Option<Figures>)> {
    let (mut runs, mut slowed) = (Vec::with_capacity(shape.repeat), Vec::new());
    for turn in 0..=shape.repeat {
        let timelines = together(target, shape, streams, turn).await?;
        bar.inc(1);
        if turn > 0 {
            runs.push(timelines);
        }
        if let Some(slow) = slow {
            let disturbed = slow.begin()?;
            let timelines = together(target, shape, streams, turn + SLOWED_TURNS).await?;
            drop(disturbed);
            bar.inc(1);
            if turn > 0 {
                slowed.push(timelines);
            }
        }
    }
    let figures = Figures::of(&runs).context("a stream ended without a token")?;
    Ok((figures, slow.and_then(|_| Figures::of(&slowed))))
}

/// One run: all streams at once.
async fn together<T: Target>(
    target: &Arc<T>,
    shape: &Shape,
    streams: usize,
    turn: usize,
) -> Result<Vec<Timeline>> {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for stream in 0..streams {
        let (target, shape) = (Arc::clone(target), shape.clone());
        tasks.spawn(async move {
            let prompt = prompt(&shape, turn, stream);
            let mut tokens = Vec::with_capacity(shape.generate as usize);
            target.generate(prompt, shape.generate, || tokens.push(begun.elapsed())).await?;
            ensure!(
                tokens.len() == shape.generate as usize,
                "a stream ended after {} of {} tokens",
                tokens.len(),
                shape.generate
            );
            Ok(Timeline { prompt_tokens: shape.prompt, tokens })
        });
    }
    let mut timelines = Vec::with_capacity(streams);
    while let Some(done) = tasks.join_next().await {
        timelines.push(done.context("a stream's task broke")??);
    }
    Ok(timelines)
}

/// A prompt that no other stream or run has, so that nothing can be reused, and that is the same in every
/// bench of this shape.
fn prompt(shape: &Shape, turn: usize, stream: usize) -> Vec<u32> {
    let range = shape.max_token_id.saturating_sub(FIRST_TOKEN_ID).max(1);
    let mut state = (turn as u64) << 32 | stream as u64;
    (0..shape.prompt)
        .map(|_| {
            // SplitMix64: any well-mixed sequence does.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            FIRST_TOKEN_ID + ((mixed ^ (mixed >> 31)) % u64::from(range)) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting;

    impl Target for Counting {
        async fn generate(
            &self,
            prompt: Vec<u32>,
            generate: u32,
            mut on_token: impl FnMut() + Send,
        ) -> Result<()> {
            assert_eq!(prompt.len(), 8);
            (0..generate).for_each(|_| on_token());
            Ok(())
        }
    }

    struct Short;

    impl Target for Short {
        async fn generate(&self, _: Vec<u32>, _: u32, mut on_token: impl FnMut() + Send) -> Result<()> {
            on_token();
            Ok(())
        }
    }

    fn shape() -> Shape {
        Shape { prompt: 8, generate: 3, repeat: 2, max_token_id: 500 }
    }

    #[tokio::test]
    async fn counts_every_stream_of_every_run() {
        let bar = ProgressBar::hidden();
        let (figures, slowed) = run(&Arc::new(Counting), &shape(), 4, None, &bar).await.expect("a load");
        assert_eq!(slowed, None);
        assert_eq!((figures.streams, figures.prompt_tokens, figures.generated_tokens), (4, 8, 3));
    }

    #[tokio::test]
    async fn a_stream_that_ends_early_is_an_error() {
        let error =
            run(&Arc::new(Short), &shape(), 1, None, &ProgressBar::hidden()).await.expect_err("too short");
        assert_eq!(error.to_string(), "a stream ended after 1 of 3 tokens");
    }

    #[test]
    fn prompts_differ_and_stay_in_range() {
        let shape = shape();
        assert_ne!(prompt(&shape, 1, 0), prompt(&shape, 1, 1));
        assert_ne!(prompt(&shape, 0, 1), prompt(&shape, 1, 0));
        assert_eq!(prompt(&shape, 1, 1), prompt(&shape, 1, 1));
        assert!(prompt(&shape, 3, 3).iter().all(|id| (16..500).contains(id)));
    }
}
