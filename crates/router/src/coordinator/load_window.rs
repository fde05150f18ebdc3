//! Tokens per (layer, logical expert) over a sliding window, in a ring of buckets.
//!
//! A report is counted in the bucket of its arrival; a bucket leaves the window whole, so the window is
//! exact to one bucket. The sum is kept beside the buckets and always equals theirs.
//!
//! Memory: at V3's 59 MoE layers of 256 experts a bucket is 118 KiB, so 60 buckets and the sum are 7 MiB.

use std::{collections::VecDeque, time::Duration};

use cadre_placement::{ExpertLoad, LayerLoad};
use cadre_types::{LayerId, LogicalExpert};
use tokio::time::Instant;

/// Buckets of a window.
const BUCKETS: u32 = 60;

/// The window.
#[derive(Debug)]
pub(super) struct LoadWindow {
    layers: Vec<LayerId>,
    num_experts: usize,
    bucket: Duration,
    /// Oldest first; each with the time at which it was begun.
    buckets: VecDeque<(Instant, Vec<u64>)>,
    /// `[layer position * num_experts + expert]`.
    sum: Vec<u64>,
}

/// A count that does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LoadMismatch {
    /// Not a layer with experts.
    #[error("expert load of {layer}: the model has no experts there")]
    Layer { layer: LayerId },
    /// Another number of experts.
    #[error("expert load of {layer}: {found} experts, expected {expected}")]
    Experts { layer: LayerId, found: usize, expected: usize },
}

impl LoadWindow {
    /// A window over the layers and experts of a model, which are those of any load of it.
    pub(super) fn new(model: &ExpertLoad, window: Duration) -> Self {
        let layers: Vec<LayerId> = model.layers().iter().map(|layer| layer.layer).collect();
        let num_experts = model.num_experts();
        let sum = vec![0; layers.len() * num_experts];
        // A window shorter than a second would only measure the rhythm of reports.
        let bucket = window.max(Duration::from_secs(1)) / BUCKETS;
        Self { layers, num_experts, bucket, buckets: VecDeque::new(), sum }
    }

    /// Whether the model has this expert.
    pub(super) fn has(&self, layer: LayerId, expert: LogicalExpert) -> bool {
        self.layers.binary_search(&layer).is_ok() && expert.index() < self.num_experts
    }

    /// Counts a report.
    pub(super) fn add(&mut self, now: Instant, load: &[(LayerId, Vec<u64>)]) -> Result<(), LoadMismatch> {
        let placed = load.iter().map(|(layer, tokens)| Ok((self.offset(*layer, tokens)?, tokens)));
        let placed = placed.collect::<Result<Vec<_>, LoadMismatch>>()?;
        if placed.is_empty() {
            return Ok(());
        }
        self.slide(now);
        if self.buckets.back().is_none_or(|(begun, _)| now.duration_since(*begun) >= self.bucket) {
            self.buckets.push_back((now, vec![0; self.sum.len()]));
        }
        let Some((_, newest)) = self.buckets.back_mut() else { return Ok(()) };
        for (offset, tokens) in placed {
            for (at, &count) in tokens.iter().enumerate() {
                // Saturating on both sides keeps sum and bucket consistent enough to never wrap.
                newest[offset + at] = newest[offset + at].saturating_add(count);
                self.sum[offset + at] = self.sum[offset + at].saturating_add(count);
            }
        }
        Ok(())
    }

    /// The load of the window that ends now.
    pub(super) fn load(&mut self, now: Instant) -> ExpertLoad {
        self.slide(now);
        let layers = self
            .layers
            .iter()
            .zip(self.sum.chunks(self.num_experts.max(1)))
            .map(|(&layer, tokens)| LayerLoad { layer, tokens: tokens.to_vec() })
            .collect();
        ExpertLoad::new(layers).expect("layers of a placement ascend and have the same number of experts")
    }

    fn slide(&mut self, now: Instant) {
        let window = self.bucket * BUCKETS;
        while self.buckets.front().is_some_and(|(begun, _)| now.duration_since(*begun) >= window) {
            let Some((_, oldest)) = self.buckets.pop_front() else { return };
            for (sum, count) in self.sum.iter_mut().zip(oldest) {
                *sum = sum.saturating_sub(count);
            }
        }
    }

    fn offset(&self, layer: LayerId, tokens: &[u64]) -> Result<usize, LoadMismatch> {
        let at = self.layers.binary_search(&layer).map_err(|_| LoadMismatch::Layer { layer })?;
        if tokens.len() != self.num_experts {
            let (found, expected) = (tokens.len(), self.num_experts);
            return Err(LoadMismatch::Experts { layer, found, expected });
        }
        Ok(at * self.num_experts)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn window() -> LoadWindow {
        let model = ExpertLoad::uniform([LayerId(1), LayerId(2)], 2).unwrap();
        LoadWindow::new(&model, Duration::from_secs(60))
    }

    fn tokens(window: &mut LoadWindow, now: Instant) -> Vec<Vec<u64>> {
        window.load(now).layers().iter().map(|layer| layer.tokens.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn counts_add_up_and_leave_after_the_window() {
        let mut window = window();
        let start = Instant::now();
        window.add(start, &[(LayerId(1), vec![3, 4])]).unwrap();
        window
            .add(start + Duration::from_secs(30), &[(LayerId(1), vec![1, 0]), (LayerId(2), vec![0, 9])])
            .unwrap();
        assert_eq!(tokens(&mut window, start + Duration::from_secs(59)), [[4, 4], [0, 9]]);
        assert_eq!(tokens(&mut window, start + Duration::from_secs(61)), [[1, 0], [0, 9]]);
        assert_eq!(tokens(&mut window, start + Duration::from_secs(600)), [[0, 0], [0, 0]]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_ring_is_bounded() {
        let mut window = window();
        let start = Instant::now();
        for second in 0..500 {
            window.add(start + Duration::from_secs(second), &[(LayerId(1), vec![1, 1])]).unwrap();
            assert!(window.buckets.len() <= BUCKETS as usize);
        }
        assert_eq!(tokens(&mut window, start + Duration::from_secs(499))[0], [60, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn counts_of_another_model_change_nothing() {
        let mut window = window();
        let now = Instant::now();
        let wrong_layer = window.add(now, &[(LayerId(1), vec![1, 1]), (LayerId(3), vec![1, 1])]);
        assert_eq!(wrong_layer, Err(LoadMismatch::Layer { layer: LayerId(3) }));
        let wrong_count = window.add(now, &[(LayerId(1), vec![1])]);
        let expected = LoadMismatch::Experts { layer: LayerId(1), found: 1, expected: 2 };
        assert_eq!(wrong_count, Err(expected));
        assert_eq!(tokens(&mut window, now), [[0, 0], [0, 0]]);
    }
}
