#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn token_at(logits: &[f32], params: &SamplingParams, position: Position) -> TokenId {
    let mut scratch = logits.to_vec();
    Sampler::new().sample(&mut scratch, params, History::default(), position).unwrap().token
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

/// A row like a model's: a few likely tokens, a long tail, from a fixed hash of the id.
fn peaked_row(vocabulary: u32) -> Vec<f32> {
    (0..vocabulary)
        .map(|token| {
            let hash = (token.wrapping_mul(0x9E37_79B9) ^ 0x5bd1_e995).wrapping_mul(0x85eb_ca6b);
            let uniform = (hash >> 8) as f32 / (1 << 24) as f32;
            8.0 - 20.0 * uniform.sqrt()
        })
        .collect()
}

mod greedy_choice {
    use super::*;

    #[test]
    fn largest_logit_lowest_id() {
        assert_eq!(token_at(&[0.0, 3.0, 3.0, -1.0], &greedy(), 0), 1);
        assert_eq!(token_at(&[-0.0, 0.0], &greedy(), 0), 0);
        assert_eq!(token_at(&[f32::NEG_INFINITY, f32::MIN], &greedy(), 0), 1);
        let mut row = vec![0.0; 1000];
        row[777] = 1.0;
        row[999] = 1.0;
        assert_eq!(token_at(&row, &greedy(), 0), 777);
    }

    #[test]
    fn filters_and_seed_do_not_matter() {
        let row = peaked_row(500);
        let expected = token_at(&row, &greedy(), 0);
        for seed in 0..20 {
            let params = SamplingParams { seed, top_k: Some(3), top_p: 0.5, min_p: 0.3, ..greedy() };
            assert_eq!(token_at(&row, &params, seed as u32), expected);
        }
    }

    #[test]
    fn banned_tokens_are_not_chosen() {
        let row = [1.0, 2.5, 2.0, 0.0];
        // 9 is beyond the vocabulary.
        let history = History { banned: &[2, 1, 9], ..History::default() };
        let sample = |params: &SamplingParams| Sampler::new().sample(&mut row.clone(), params, history, 0);
        assert_eq!(sample(&greedy()).unwrap().token, 0);
        for seed in 0..200 {
            let params = SamplingParams { seed, temperature: 2.0, top_p: 0.9, ..Default::default() };
            assert!([0, 3].contains(&sample(&params).unwrap().token));
        }
        // Also when a penalty would lift them, and logprobs are still the model's own.
        let params = SamplingParams { repetition_penalty: 0.5, logprobs: Some(2), ..greedy() };
        let history = History { output: &[1, 2], ..history };
        let banned = Sampler::new().sample(&mut row.clone(), &params, history, 0).unwrap();
        let free = Sampler::new().sample(&mut row.clone(), &params, History::default(), 0).unwrap();
        assert_eq!((banned.token, &banned.top), (0, &free.top));
        let exact = 1.0 - row.iter().map(|logit: &f32| logit.exp()).sum::<f32>().ln();
        assert!((banned.logprob.unwrap().logprob - exact).abs() < 1e-6);
        let all = History { banned: &[0, 1, 2, 3], ..History::default() };
        let error = Sampler::new().sample(&mut row.clone(), &greedy(), all, 7).unwrap_err();
        assert_eq!(error, SampleError::NoCandidate { position: 7, vocabulary: 4 });
    }

    #[test]
    fn penalties_do_matter() {
        let params = SamplingParams { frequency_penalty: 1.0, ..greedy() };
        let history = History { prompt: &[], output: &[1, 1], ..History::default() };
        let sample = Sampler::new().sample(&mut [1.0, 2.5, 0.0], &params, history, 9).unwrap();
        assert_eq!(sample.token, 0);
    }
}

mod refusals {
    use super::*;

    fn refuse(logits: &[f32], params: &SamplingParams) -> SampleError {
        Sampler::new().sample(&mut logits.to_vec(), params, History::default(), 41).unwrap_err()
    }

    #[test]
    fn not_a_number_names_position_and_token() {
        for params in [greedy(), SamplingParams::default()] {
            let error = refuse(&[0.0, 1.0, f32::NAN], &params);
            assert!(
                matches!(error, SampleError::NotFinite { position: 41, token: 2, value } if value.is_nan())
            );
            assert_eq!(error.to_string(), "sampling at position 41: the logit of token 2 is NaN");
            assert_eq!(
                refuse(&[f32::INFINITY, 1.0], &params),
                SampleError::NotFinite { position: 41, token: 0, value: f32::INFINITY }
            );
        }
    }

    #[test]
    fn nothing_to_choose() {
        for row in [&[f32::NEG_INFINITY; 3][..], &[]] {
            let expected = SampleError::NoCandidate { position: 41, vocabulary: row.len() };
            assert_eq!(refuse(row, &greedy()), expected);
            assert_eq!(refuse(row, &SamplingParams::default()), expected);
        }
    }

    #[test]
    fn parameters_out_of_range() {
        let params = SamplingParams { top_p: f32::NAN, ..Default::default() };
        assert!(matches!(refuse(&[0.0], &params), SampleError::Params(error) if error.field == "top_p"));
    }

    #[test]
    fn a_penalty_that_overflows() {
        let params = SamplingParams { repetition_penalty: 0.01, ..Default::default() };
        let history = History { prompt: &[1], output: &[], ..History::default() };
        let error = Sampler::new().sample(&mut [0.0, 1e38], &params, history, 3).unwrap_err();
        assert_eq!(error, SampleError::NotFinite { position: 3, token: 1, value: f32::INFINITY });
    }
}

mod distribution {
    use super::*;

    /// Pearson's statistic of counts against probabilities.
    fn chi_square(counts: &HashMap<TokenId, u32>, probabilities: &[f64], draws: u32) -> f64 {
        (0..)
            .zip(probabilities)
            .map(|(token, &probability)| {
                let expected = probability * f64::from(draws);
                let seen = f64::from(counts.get(&token).copied().unwrap_or(0));
                if expected == 0.0 {
                    assert_eq!(seen, 0.0, "token {token} is impossible");
                    return 0.0;
                }
                (seen - expected) * (seen - expected) / expected
            })
            .sum()
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / total).collect()
    }

    const ROW: [f32; 8] = [0.3, -1.0, 1.7, 0.0, f32::NEG_INFINITY, 1.7, -2.5, 0.9];
    const DRAWS: u32 = 40_000;
    /// The 1 - 1e-6 quantile of chi-square with 6 degrees of freedom is 38.3; draws are fixed by the
    /// seeds, so a pass is a pass forever.
    const CRITICAL: f64 = 38.3;

    #[test]
    fn over_positions_and_over_seeds_it_is_the_softmax() {
        for temperature in [0.5_f32, 1.0, 1.6] {
            let expected = softmax(&ROW, f64::from(temperature));
            let mut by_position = HashMap::new();
            let mut by_seed = HashMap::new();
            for i in 0..DRAWS {
                let params = SamplingParams { temperature, seed: 11, ..Default::default() };
                *by_position.entry(token_at(&ROW, &params, i)).or_insert(0) += 1;
                let params = SamplingParams { seed: u64::from(i), ..params };
                *by_seed.entry(token_at(&ROW, &params, 3)).or_insert(0) += 1;
            }
            for counts in [by_position, by_seed] {
                let statistic = chi_square(&counts, &expected, DRAWS);
                assert!(statistic < CRITICAL, "temperature {temperature}: {statistic}");
            }
        }
    }

    #[test]
    fn filters_renormalise_what_they_keep() {
        // Most likely first: 2, 5 (equal), 7, 0, 3, 1, 6.
        let cases: [(SamplingParams, &[usize]); 4] = [
            (SamplingParams { top_k: Some(3), ..Default::default() }, &[2, 5, 7]),
            // 2 and 5 hold 0.328 each, 7 holds 0.147.
            (SamplingParams { top_p: 0.7, ..Default::default() }, &[2, 5, 7]),
            // Relative to the best: 7 at 0.449, 0 at 0.247, 3 at 0.183.
            (SamplingParams { min_p: 0.2, ..Default::default() }, &[2, 5, 7, 0]),
            // Of the first two, half is the first.
            (SamplingParams { top_k: Some(2), top_p: 0.5, ..Default::default() }, &[2]),
        ];
        for (params, kept) in cases {
            let mut row = [f32::NEG_INFINITY; 8];
            kept.iter().for_each(|&token| row[token] = ROW[token]);
            let mut counts = HashMap::new();
            for position in 0..DRAWS {
                *counts.entry(token_at(&ROW, &params, position)).or_insert(0) += 1;
            }
            let statistic = chi_square(&counts, &softmax(&row, 1.0), DRAWS);
            assert!(statistic < CRITICAL, "{params:?}: {statistic}");
        }
    }

    /// A draft is verified by sampling the target: the text is that without speculation, the draft is
    /// accepted with its own probability, and a refusal draws from the rest.
    #[test]
    fn a_verified_draft_changes_nothing() {
        let params = SamplingParams { seed: 5, ..Default::default() };
        let probabilities = softmax(&ROW, 1.0);
        for draft in [2_u32, 6] {
            let (mut accepted, mut refused) = (0, HashMap::new());
            for position in 0..DRAWS {
                let sample = token_at(&ROW, &params, position);
                if sample == draft {
                    accepted += 1;
                } else {
                    *refused.entry(sample).or_insert(0) += 1;
                }
            }
            let acceptance = probabilities[draft as usize];
            let outcomes = HashMap::from([(0, accepted), (1, DRAWS - accepted)]);
            // One degree of freedom: 23.9.
            assert!(chi_square(&outcomes, &[acceptance, 1.0 - acceptance], DRAWS) < 23.9);
            let rest: Vec<f64> = (0..)
                .zip(&probabilities)
                .map(|(token, p)| if token == draft { 0.0 } else { p / (1.0 - acceptance) })
                .collect();
            assert!(chi_square(&refused, &rest, DRAWS - accepted) < CRITICAL);
        }
    }

    #[test]
    fn a_long_tail_is_reached() {
        // Flat over 5,000 tokens: the walk passes the first and the second scan.
        let row = vec![0.25_f32; 5000];
        let params = SamplingParams::default();
        let most = (0..2000).map(|position| token_at(&row, &params, position)).max().unwrap();
        let expected_rank = |position| ((u128::from(random_bits(0, position)) * 5000) >> 64) as TokenId;
        for position in 0..2000 {
            assert_eq!(token_at(&row, &params, position), expected_rank(position));
        }
        assert!(most > 4900, "{most}");
    }
}

mod determinism {
    use super::*;

    #[test]
    fn a_used_sampler_answers_like_a_new_one() {
        let row = peaked_row(3000);
        let requests = [
            SamplingParams { logprobs: Some(5), ..Default::default() },
            SamplingParams {
                repetition_penalty: 1.3,
                presence_penalty: 0.5,
                seed: 2,
                logprobs: Some(2),
                ..Default::default()
            },
            SamplingParams { top_k: Some(40), top_p: 0.9, seed: 3, ..Default::default() },
            SamplingParams { min_p: 0.02, temperature: 1.7, seed: 4, ..Default::default() },
            greedy(),
        ];
        let history = History { prompt: &[1, 2, 3], output: &[40, 41, 40], ..History::default() };
        let mut used = Sampler::new();
        for position in 0..50 {
            for params in requests.iter().chain(requests.iter().rev()) {
                let old = used.sample(&mut row.clone(), params, history, position).unwrap();
                let new = Sampler::new().sample(&mut row.clone(), params, history, position).unwrap();
                assert_eq!(old, new, "{params:?} at {position}");
            }
        }
    }

    /// Fixed answers, which a separate program in Python (exact integers, the platform's exp) also gives:
    /// a change of the arithmetic, or a machine that computes otherwise, shows here.
    #[test]
    fn known_tokens() {
        let row = peaked_row(129_280);
        let params = SamplingParams { seed: 0xCAD2E, ..Default::default() };
        let drawn: Vec<TokenId> = (100..112).map(|position| token_at(&row, &params, position)).collect();
        assert_eq!(drawn, KNOWN_PLAIN);
        let filtered = SamplingParams { temperature: 0.6, top_p: 0.95, ..params };
        let drawn: Vec<TokenId> = (100..112).map(|position| token_at(&row, &filtered, position)).collect();
        assert_eq!(drawn, KNOWN_FILTERED);
    }
    const KNOWN_PLAIN: [TokenId; 12] =
        [105347, 64047, 70381, 120939, 34428, 59820, 71911, 108745, 91708, 88430, 20414, 105383];
    const KNOWN_FILTERED: [TokenId; 12] =
        [4741, 90305, 10740, 107030, 5775, 105932, 111869, 123267, 19461, 30422, 99989, 111563];

    #[test]
    fn switched_off_settings_change_nothing() {
        let row = peaked_row(1000);
        let plain = SamplingParams { seed: 9, ..Default::default() };
        let off = SamplingParams {
            top_k: Some(1000),
            repetition_penalty: 1.0,
            frequency_penalty: -0.0,
            presence_penalty: -0.0,
            ..plain.clone()
        };
        let history = History { prompt: &[0, 1, 2], output: &[3, 4, 5], ..History::default() };
        for position in 0..500 {
            let mut scratch = row.clone();
            let sample = Sampler::new().sample(&mut scratch, &off, history, position).unwrap();
            assert_eq!(sample.token, token_at(&row, &plain, position));
            assert_eq!(scratch, row, "the logits are untouched");
            assert_eq!((sample.logprob, sample.top), (None, Vec::new()));
        }
    }
}

mod logprobs {
    use super::*;

    #[test]
    fn they_are_raw_and_penalties_do_not_show() {
        let row = [0.25_f32, 3.0, 2.0, 3.0];
        let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        let raw = |token: usize| (f64::from(row[token]) - total.ln()) as f32;
        let params =
            SamplingParams { logprobs: Some(3), presence_penalty: 2.0, repetition_penalty: 4.0, ..greedy() };
        // Token 2 becomes 0.5 and still wins: 1 and 3 become -1.25.
        let history = History { prompt: &[2], output: &[1, 3], ..History::default() };
        let sample = Sampler::new().sample(&mut row.clone(), &params, history, 0).unwrap();
        assert_eq!(sample.token, 2);
        let chosen = sample.logprob.unwrap();
        assert_eq!(chosen.token, 2);
        assert!((chosen.logprob - raw(2)).abs() < 1e-6);
        assert_eq!(sample.top.iter().map(|entry| entry.token).collect::<Vec<_>>(), [1, 3, 2]);
        for entry in sample.top {
            assert!((entry.logprob - raw(entry.token as usize)).abs() < 1e-6);
        }
    }

    #[test]
    fn the_count_is_what_was_asked_for() {
        for (count, expected) in [(0, 0), (1, 1), (20, 4)] {
            let params = SamplingParams { logprobs: Some(count), ..Default::default() };
            let mut row = [1.0, 3.0, 2.0, 3.0];
            let sample = Sampler::new().sample(&mut row, &params, History::default(), 0).unwrap();
            assert!(sample.logprob.is_some());
            assert_eq!(sample.top.len(), expected);
        }
    }
}

/// The definition, by full sort and exact probabilities: which tokens remain. `None` where F64
/// rounding could decide otherwise than exact arithmetic.
fn naive_kept(logits: &[f32], params: &SamplingParams) -> Option<Vec<TokenId>> {
    let mut order: Vec<usize> =
        (0..logits.len()).filter(|&token| logits[token] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(params.top_k.map_or(usize::MAX, |k| k as usize));
    let best = f64::from(logits[order[0]]);
    let weight = |token: usize| ((f64::from(logits[token]) - best) / f64::from(params.temperature)).exp();
    // Half a unit of 2^-40 and less is never drawn.
    let units = |token: usize| weight(token) * (1_u64 << 40) as f64;
    if order.iter().any(|&token| (units(token) - 0.5).abs() < 1e-3) {
        return None;
    }
    order.retain(|&token| units(token) > 0.5);
    let total: f64 = order.iter().map(|&token| weight(token)).sum();
    let mut kept = Vec::new();
    let mut cumulative = 0.0;
    for &token in &order {
        if (weight(token) - f64::from(params.min_p)).abs() < 1e-9 && params.min_p > 0.0 && token != order[0] {
            return None;
        }
        if !kept.is_empty() && weight(token) < f64::from(params.min_p) {
            break;
        }
        kept.push(token as TokenId);
        cumulative += weight(token) / total;
        if params.top_p < 1.0 {
            if (cumulative - f64::from(params.top_p)).abs() < 1e-9 {
                return None;
            }
            if cumulative >= f64::from(params.top_p) {
                break;
            }
        }
    }
    Some(kept)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn filters_keep_the_set_of_the_definition(
        logits in prop::collection::vec(
            prop_oneof![8 => -6.0..3.0_f32, 2 => (-3..3_i8).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY)], 1..700),
        temperature in 0.2..2.0_f32,
        top_p in prop_oneof![Just(1.0_f32), 0.01..1.0_f32],
        top_k in prop_oneof![Just(None), (1..800_u32).prop_map(Some)],
        min_p in prop_oneof![Just(0.0_f32), 0.0..0.5_f32],
    ) {
        prop_assume!(logits.iter().any(|&logit| logit > f32::NEG_INFINITY));
        let params = SamplingParams { temperature, top_p, top_k, min_p, ..Default::default() };
        let expected = naive_kept(&logits, &params);
        prop_assume!(expected.is_some());
        let expected = expected.unwrap();
        // The first and the last ticket of the draw name the ends of what is kept.
        let largest = ranking::largest(&logits).unwrap();
        let mut sampler = Sampler::new();
        prop_assert_eq!(sampler.draw(&logits, largest, &params, 0), expected[0]);
        let last = sampler.draw(&logits, largest, &params, u64::MAX);
        prop_assert_eq!(last, *expected.last().unwrap());
        for position in 0..20 {
            let token = token_at(&logits, &params, position);
            prop_assert!(expected.contains(&token), "{} is not among {:?}", token, expected);
        }
    }

    #[test]
    fn the_same_seed_and_position_give_the_same_token(
        seed: u64,
        position in 0..4096_u32,
        rows in prop::collection::vec(prop::collection::vec(-4.0..4.0_f32, 50), 1..5),
        which in any::<prop::sample::Index>(),
    ) {
        // One sampler over a batch of other rows, and a new one for this row alone.
        let params = SamplingParams { seed, ..Default::default() };
        let row = &rows[which.index(rows.len())];
        let mut sampler = Sampler::new();
        for other in &rows {
            sampler.sample(&mut other.clone(), &params, History::default(), position ^ 1).unwrap();
        }
        let among = sampler.sample(&mut row.clone(), &params, History::default(), position).unwrap();
        prop_assert_eq!(among.token, token_at(row, &params, position));
    }
}
