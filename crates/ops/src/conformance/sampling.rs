//! Drawing tokens: exact in every class, because the sampler is.

use cadre_sampler::{History, Sample, SampleError};
use cadre_types::SamplingParams;

use super::{Suite, data::Stream};
use crate::{backend::Backend, step::SampleRow};

struct Request {
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    banned: Vec<u32>,
    position: u32,
}

fn request(stream: &mut Stream, vocab: usize) -> Request {
    let mut tokens = |most: usize| (0..stream.below(most)).map(|_| stream.below(vocab) as u32).collect();
    let (prompt, output): (Vec<u32>, Vec<u32>) = (tokens(20), tokens(30));
    // One beyond the vocabulary bans nothing; all of a small one leave nothing to choose.
    let banned: Vec<u32> = tokens(4).into_iter().map(|token| token + token % 2).collect();
    let greedy = stream.below(3) == 0;
    let penalised = stream.below(3) == 0;
    let pick = |stream: &mut Stream, values: &[f32]| values[stream.below(values.len())];
    let params = SamplingParams {
        temperature: if greedy { 0.0 } else { pick(stream, &[0.05, 0.7, 1.0, 1.9]) },
        top_k: stream.coin().then(|| 1 + stream.below(2 * vocab) as u32),
        top_p: if stream.coin() { 1.0 } else { pick(stream, &[0.01, 0.5, 0.9, 0.999]) },
        min_p: if stream.coin() { 0.0 } else { pick(stream, &[0.01, 0.3, 1.0]) },
        repetition_penalty: if penalised { 1.3 } else { 1.0 },
        frequency_penalty: if penalised { 0.7 } else { 0.0 },
        presence_penalty: if penalised { -0.4 } else { 0.0 },
        seed: stream.bits(),
        logprobs: stream.coin().then(|| stream.below(6) as u32),
    };
    Request { params, prompt, output, banned, position: stream.below(4000) as u32 }
}

fn draw<B: Backend>(
    backend: &B,
    logits: &[f32],
    vocab: usize,
    requests: &[Request],
) -> Vec<Result<Sample, SampleError>> {
    let queue = &mut backend.queue().unwrap();
    let capacity = logits.len() / vocab;
    let mut on_device = backend.alloc_logits(capacity, vocab).unwrap();
    backend.write_logits(queue, logits, &mut on_device).unwrap();
    // Rows from the last to the first.
    let rows: Vec<SampleRow<'_>> = requests
        .iter()
        .enumerate()
        .map(|(i, request)| SampleRow {
            row: capacity - 1 - i,
            params: &request.params,
            history: History { prompt: &request.prompt, output: &request.output, banned: &request.banned },
            position: request.position,
        })
        .collect();
    let samples = backend.sample(queue, &mut on_device, &rows).unwrap();
    drop(rows);
    backend.samples(queue, &mut on_device, samples).unwrap()
}

pub(super) fn draws<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("samples", |stream, rows| {
        let vocab = [1, 2 + stream.below(60), 300, 4096, 20_000][stream.below(5)];
        let rows = rows.min(33);
        // Peaked, flat, with ties, with impossible tokens.
        let scale = [0.0, 0.3, 4.0, 30.0][stream.below(4)];
        let coarse = stream.coin();
        let mut logits: Vec<f32> = (0..(rows + 1) * vocab)
            .map(|_| match stream.value() * scale {
                logit if coarse => logit.round(),
                logit => logit,
            })
            .collect();
        if vocab > 2 && stream.coin() {
            for row in logits.chunks_mut(vocab) {
                row[1..vocab / 2].iter_mut().step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
            }
        }
        let requests: Vec<Request> = (0..rows).map(|_| request(stream, vocab)).collect();
        let got = draw(suite.backend, &logits, vocab, &requests);
        let expected = draw(&suite.reference, &logits, vocab, &requests);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "row {i} of {rows}, vocabulary {vocab}, {:?}", requests[i].params);
        }
        assert_eq!(got.len(), rows);
    });
}

/// A row's trouble is its own: the same words, and the other rows are drawn.
pub(super) fn bad_rows<B: Backend>(suite: &Suite<'_, B>) {
    let vocab = 200;
    let stream = &mut Stream::new(8);
    let mut logits = stream.values(6 * vocab);
    logits[5 * vocab + 150] = f32::NAN;
    logits[5 * vocab + 151] = f32::INFINITY;
    logits[4 * vocab + 7] = f32::INFINITY;
    logits[3 * vocab..4 * vocab].fill(f32::NEG_INFINITY);
    let mut requests: Vec<Request> = (0..6).map(|_| request(stream, vocab)).collect();
    for request in &mut requests {
        request.banned.clear();
        request.params = SamplingParams { logprobs: Some(2), ..SamplingParams::default() };
    }
    requests[3].params.top_p = 7.0;
    requests[4].params.presence_penalty = 1.0;
    requests[4].output = vec![3, vocab as u32];
    let got = draw(suite.backend, &logits, vocab, &requests);
    let expected = draw(&suite.reference, &logits, vocab, &requests);
    for (got, expected) in got.iter().zip(&expected) {
        // As text: a NaN in an error is not equal to itself.
        assert_eq!(format!("{got:?}"), format!("{expected:?}"));
    }
    assert_eq!(expected.iter().filter(|sample| sample.is_err()).count(), 5);
    assert!(got[5].is_ok(), "{:?}", got[5]);
}
