//! The choice of experts from a row of logits (spec §6): pure, and the one implementation of the
//! rule for every backend that chooses on the host.

use cadre_numerics::{
    exp::{exp, sigmoid},
    reduce,
};

use crate::{
    error::OpsError,
    shape::{GateShape, GroupScore, Scoring},
};

/// Chooses experts row by row; keeps its scratch between rows.
#[derive(Debug, Default)]
pub struct Chooser {
    scores: Vec<f32>,
    selection: Vec<f32>,
    group_scores: Vec<f32>,
    kept: Vec<bool>,
    chosen: Vec<u16>,
}

impl Chooser {
    /// Appends `shape.top_k` ids, ascending, and their weights. The shape was checked by
    /// [`crate::check::gate`]; `logits` and `bias` have `shape.experts` entries.
    pub fn choose(
        &mut self,
        logits: &[f32],
        bias: &[f32],
        shape: &GateShape,
        row: usize,
        topk_idx: &mut Vec<u16>,
        topk_weights: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        let mut scores = std::mem::take(&mut self.scores);
        scores.clear();
        match shape.scoring {
            Scoring::Sigmoid => scores.extend(logits.iter().map(|logit| sigmoid(*logit))),
            Scoring::Softmax => softmax(logits, &mut scores),
        }
        let result = self.choose_scored(&scores, bias, shape, row, topk_idx, topk_weights);
        self.scores = scores;
        result
    }

    /// As [`Self::choose`], from the scores of the logits (a NaN logit is a NaN score).
    ///
    /// `selection = score + bias` is used for choosing only. A group's score is the sum of its two largest
    /// selections (of its only one, in groups of one), or its largest. Of the kept groups the largest
    /// selections win; every tie goes to the lowest id. Weights are the scores, divided by (their sum in
    /// ascending id order + 1e-20) if the shape says so, times the factor.
    pub fn choose_scored(
        &mut self,
        scores: &[f32],
        bias: &[f32],
        shape: &GateShape,
        row: usize,
        topk_idx: &mut Vec<u16>,
        topk_weights: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        if let Some(expert) = scores.iter().position(|score| score.is_nan()) {
            return Err(OpsError::NanGate { row, expert });
        }
        self.selection.clear();
        self.selection.extend(scores.iter().zip(bias).map(|(score, bias)| score + bias));
        self.keep_groups(shape);
        self.choose_experts(shape);

        let weight = |expert: &u16| scores[usize::from(*expert)];
        let sum = self.chosen.iter().map(weight).fold(0.0_f32, |sum, s| sum + s) + 1e-20;
        topk_idx.extend_from_slice(&self.chosen);
        topk_weights.extend(self.chosen.iter().map(|expert| {
            let score = weight(expert);
            let share = if shape.norm_topk_prob { score / sum } else { score };
            share * shape.routed_scaling_factor
        }));
        Ok(())
    }

    fn keep_groups(&mut self, shape: &GateShape) {
        self.kept.clear();
        self.kept.resize(shape.n_group, shape.topk_group == shape.n_group);
        if shape.topk_group == shape.n_group {
            return;
        }
        self.group_scores.clear();
        let groups = self.selection.chunks_exact(shape.experts / shape.n_group);
        let score = match shape.group_score {
            GroupScore::TwoLargest => two_largest,
            GroupScore::Largest => the_largest,
        };
        self.group_scores.extend(groups.map(score));
        for _ in 0..shape.topk_group {
            let free = (0..shape.n_group).filter(|group| !self.kept[*group]);
            if let Some(best) = largest(free, &self.group_scores) {
                self.kept[best] = true;
            }
        }
    }

    fn choose_experts(&mut self, shape: &GateShape) {
        let size = shape.experts / shape.n_group;
        self.chosen.clear();
        // A taken expert's selection becomes NaN, which no comparison prefers.
        for (group, selection) in self.selection.chunks_exact_mut(size).enumerate() {
            if !self.kept[group] {
                selection.fill(f32::NAN);
            }
        }
        for _ in 0..shape.top_k {
            if let Some(best) = largest(0..shape.experts, &self.selection) {
                self.selection[best] = f32::NAN;
                self.chosen.push(best as u16);
            }
        }
        self.chosen.sort_unstable();
    }
}

/// `exp(logit - largest) / sum`, the sum in the 16-lane order. Of a row with a NaN the first is marked.
fn softmax(logits: &[f32], scores: &mut Vec<f32>) {
    if let Some(expert) = logits.iter().position(|logit| logit.is_nan()) {
        // Only the culprit is to be found.
        scores.resize(logits.len(), 0.0);
        scores[expert] = f32::NAN;
        return;
    }
    let largest = the_largest(logits);
    // Infinite logits share everything among them.
    let distance = |logit: f32| if logit == largest { 0.0 } else { logit - largest };
    scores.extend(logits.iter().map(|logit| exp(distance(*logit))));
    let sum = reduce::sum(scores);
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// The largest of numbers.
fn the_largest(group: &[f32]) -> f32 {
    group
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, |largest, value| if value > largest { value } else { largest })
}

/// Sum of the two largest, or the only one.
fn two_largest(group: &[f32]) -> f32 {
    if let [only] = group {
        return *only;
    }
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for value in group.iter().copied() {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    first + second
}

/// The lowest of the candidates with the largest value; NaN is no candidate.
fn largest(candidates: impl Iterator<Item = usize>, values: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for candidate in candidates.filter(|candidate| !values[*candidate].is_nan()) {
        if best.is_none_or(|best| values[candidate] > values[best]) {
            best = Some(candidate);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn choose(logits: &[f32], bias: &[f32], shape: &GateShape) -> (Vec<u16>, Vec<f32>) {
        let (mut idx, mut weights) = (Vec::new(), Vec::new());
        Chooser::default().choose(logits, bias, shape, 0, &mut idx, &mut weights).unwrap();
        (idx, weights)
    }

    fn shape(experts: usize, n_group: usize, topk_group: usize, top_k: usize) -> GateShape {
        let (norm_topk_prob, routed_scaling_factor) = (true, 2.5);
        let (scoring, group_score) = (Scoring::Sigmoid, GroupScore::TwoLargest);
        GateShape {
            scoring,
            group_score,
            experts,
            n_group,
            topk_group,
            top_k,
            norm_topk_prob,
            routed_scaling_factor,
        }
    }

    /// Spec §6: masking with 0 instead of leaving the group out would choose 5, 2, 3.
    #[test]
    fn golden_case_with_negative_selections() {
        let logits = [1.0, -1.0, 0.5, 0.0, 2.0, -2.0, 0.2, 0.1];
        let bias = [-0.9, -0.3, -1.2, -0.8, -1.0, 0.1, -1.1, -0.7];
        let (idx, weights) = choose(&logits, &bias, &shape(8, 4, 2, 3));
        assert_eq!(idx, [1, 4, 5]);
        for (got, expected) in weights.iter().zip([0.5299, 1.7353, 0.2348]) {
            assert!((got - expected).abs() < 5e-5, "{got} {expected}");
        }
    }

    #[test]
    fn ties_choose_the_lowest_ids() {
        let (idx, weights) = choose(&[0.0; 8], &[0.5; 8], &shape(8, 4, 2, 3));
        assert_eq!(idx, [0, 1, 2]);
        assert!(weights.iter().all(|w| (w - 2.5 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn one_group_and_groups_of_one() {
        let logits = [0.0, 3.0, -1.0, 2.0];
        assert_eq!(choose(&logits, &[0.0; 4], &shape(4, 1, 1, 2)).0, [1, 3]);
        assert_eq!(choose(&logits, &[0.0; 4], &shape(4, 4, 2, 2)).0, [1, 3]);
        assert_eq!(choose(&logits, &[0.0, 0.0, 5.0, 0.0], &shape(4, 4, 2, 2)).0, [1, 2]);
    }

    #[test]
    fn weights_can_stay_unnormalised() {
        let shape = GateShape { norm_topk_prob: false, ..shape(2, 1, 1, 1) };
        let (idx, weights) = choose(&[0.0, -9.0], &[0.0; 2], &shape);
        assert_eq!((idx, weights), (vec![0], vec![1.25]));
    }

    #[test]
    fn nan_is_refused_with_its_place() {
        let mut logits = [0.0; 8];
        logits[6] = f32::NAN;
        let error = Chooser::default().choose(
            &logits,
            &[0.0; 8],
            &shape(8, 2, 1, 2),
            3,
            &mut Vec::new(),
            &mut Vec::new(),
        );
        assert_eq!(error, Err(OpsError::NanGate { row: 3, expert: 6 }));
    }

    #[test]
    fn infinite_logits_are_numbers() {
        let logits = [f32::NEG_INFINITY, f32::INFINITY, 0.0, 0.0];
        let (idx, weights) = choose(&logits, &[0.0; 4], &shape(4, 2, 1, 2));
        assert_eq!(idx, [0, 1]);
        assert_eq!(weights, [0.0, 2.5]);
    }

    #[test]
    fn softmax_scores_and_largest_groups() {
        let rule = GateShape {
            scoring: Scoring::Softmax,
            group_score: GroupScore::Largest,
            norm_topk_prob: false,
            routed_scaling_factor: 1.0,
            ..shape(4, 2, 1, 2)
        };
        // Group 0 has the largest logit, group 1 the larger sum of two.
        let logits = [2.0, -5.0, 1.5, 1.5];
        let (idx, weights) = choose(&logits, &[0.0; 4], &rule);
        assert_eq!(idx, [0, 1]);
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        for (weight, logit) in weights.iter().zip([2.0_f32, -5.0]) {
            assert!((weight - logit.exp() / sum).abs() < 1e-6, "{weight}");
        }
        let two = GateShape { group_score: GroupScore::TwoLargest, ..rule };
        assert_eq!(choose(&logits, &[0.0; 4], &two).0, [2, 3]);
        let infinite = [f32::INFINITY, 0.0, f32::NEG_INFINITY, 0.0];
        assert_eq!(choose(&infinite, &[0.0; 4], &rule).1, [1.0, 0.0]);
    }
}
