//! Forms of one computation: naive and absorbed, whole and chunked, alone and among others.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

mod support;

use cadre_model::{LogitRows, Segment, SegmentKind, StepBatch, StepOutput, Workspace};
use cadre_types::{LayerId, NumericsClass, PageId};
use support::{Golden, Pocket, relative_distance, table};

#[test]
fn absorbed_equals_naive_within_the_bound() {
    let ids = Golden::case(5).u32("input_ids");
    let pages = table(ids.len());
    // In bf16 a rounding may send a token to another expert, which moves a row's logits by more than the
    // arithmetic does: the median is the arithmetic, the worst row is a changed choice.
    for (class, median, worst) in [(NumericsClass::F32, 1e-5, 1e-4), (NumericsClass::Bf16, 2e-2, 0.3)] {
        let mut pocket = Pocket::open(class, 512);
        let vocab = pocket.model.config().vocab_size;
        let naive = pocket.prefill(&ids, 512, &pages);
        pocket.prefill(&ids[..200], 512, &pages);
        // Teacher-forced in decode form from position 200 on.
        let absorbed = pocket.step(SegmentKind::Decode, &ids[200..], 200, &pages, &mut ());
        let expected = naive.logits[200 * vocab..].chunks(vocab);
        let mut distances: Vec<f32> =
            absorbed.logits.chunks(vocab).zip(expected).map(|(a, b)| relative_distance(a, b)).collect();
        distances.sort_by(f32::total_cmp);
        assert!(
            distances[distances.len() / 2] <= median,
            "{class}: median {}",
            distances[distances.len() / 2]
        );
        assert!(distances[distances.len() - 1] <= worst, "{class}: worst {}", distances[distances.len() - 1]);
    }
}

#[test]
fn chunks_of_a_prompt_give_the_same_bits_as_the_whole() {
    let ids = Golden::case(5).u32("input_ids");
    let pages = table(ids.len());
    for class in NumericsClass::ALL {
        let mut pocket = Pocket::open(class, 512);
        let whole = pocket.prefill(&ids, 512, &pages);
        let kv = pocket.kv(&pages, ids.len());
        for chunk in [1, 7, 64, 100] {
            let chunked = pocket.prefill(&ids, chunk, &pages);
            assert_eq!(whole.logits, chunked.logits, "{class}, chunks of {chunk}");
            assert_eq!(kv, pocket.kv(&pages, ids.len()), "{class}, KV, chunks of {chunk}");
        }
    }
}

#[test]
fn decode_rows_together_give_the_same_bits_as_one_by_one() {
    let ids = Golden::case(3).u32("input_ids");
    let pages = table(ids.len());
    for class in NumericsClass::ALL {
        let mut pocket = Pocket::open(class, 512);
        pocket.prefill(&ids[..50], 512, &pages);
        let together = pocket.step(SegmentKind::Decode, &ids[50..], 50, &pages, &mut ());
        let kv = pocket.kv(&pages, ids.len());
        pocket.prefill(&ids[..50], 512, &pages);
        let mut single = StepOutput::default();
        for (row, token) in ids[50..].iter().enumerate() {
            let out = pocket.step(SegmentKind::Decode, &[*token], 50 + row, &pages, &mut ());
            single.logits.extend(out.logits);
        }
        assert_eq!(together.logits, single.logits, "{class}");
        assert_eq!(kv, pocket.kv(&pages, ids.len()), "{class}, KV");
    }
}

#[test]
fn a_sequence_among_others_on_scattered_pages_gives_the_same_bits() {
    let (short, long) = (Golden::case(2).u32("input_ids"), Golden::case(5).u32("input_ids"));
    let mut pocket = Pocket::open(NumericsClass::Bf16, 512);
    let vocab = pocket.model.config().vocab_size;
    let straight = table(long.len());
    let alone = pocket.prefill(&long, 512, &straight);

    let scattered: Vec<PageId> = [40, 3, 22, 9, 31].map(PageId).to_vec();
    let other: Vec<PageId> = [17, 45].map(PageId).to_vec();
    let segment = |tokens, block_table| Segment {
        kind: SegmentKind::Prefill,
        tokens,
        first_position: 0,
        block_table,
        logits: LogitRows::All,
    };
    let batch =
        StepBatch { segments: vec![segment(&short[..], &other[..]), segment(&long[..], &scattered[..])] };
    pocket.model.forward(&mut pocket.ws, &batch, &mut pocket.cache, &mut pocket.experts, &mut ()).unwrap();
    let out = pocket.model.read(&mut pocket.ws).unwrap();
    assert_eq!(alone.logits, out.logits[short.len() * vocab..]);
}

/// Two micro-batches that take turns at every layer give the bits that each gives alone.
#[test]
fn micro_batches_that_take_turns_give_the_same_bits() {
    let (first, second) = (Golden::case(3).u32("input_ids"), Golden::case(2).u32("input_ids"));
    let mut pocket = Pocket::open(NumericsClass::Bf16, 512);
    let tables = [[4, 9, 1], [7, 3, 12]].map(|pages| pages.map(PageId));
    let alone = [&first, &second].map(|ids| pocket.prefill(ids, 512, &table(ids.len())).logits);
    let batch = |tokens, block_table| StepBatch {
        segments: vec![Segment {
            kind: SegmentKind::Prefill,
            tokens,
            first_position: 0,
            block_table,
            logits: LogitRows::All,
        }],
    };
    let batches = [batch(&first[..], &tables[0][..]), batch(&second[..], &tables[1][..])];
    let Pocket { model, experts, ws, cache } = &mut pocket;
    let mut other = Workspace::new(model, 512, 512).unwrap();
    model.begin(ws, &batches[0]).unwrap();
    model.begin(&mut other, &batches[1]).unwrap();
    let layers = (0..model.config().num_hidden_layers as u16).map(LayerId);
    let mut under_way = None;
    for layer in layers {
        // The second leaves its layer while the first's rows are with their experts, and the other way round.
        let a = model.enter(ws, layer, cache, experts, &mut ()).unwrap();
        if let Some(ticket) = under_way.take() {
            model.leave(&mut other, ticket, experts, &mut ()).unwrap();
        }
        let b = model.enter(&mut other, layer, cache, experts, &mut ()).unwrap();
        model.leave(ws, a, experts, &mut ()).unwrap();
        under_way = Some(b);
    }
    model.leave(&mut other, under_way.unwrap(), experts, &mut ()).unwrap();
    model.finish(ws).unwrap();
    model.finish(&mut other).unwrap();
    assert_eq!(model.read(ws).unwrap().logits, alone[0]);
    assert_eq!(model.read(&mut other).unwrap().logits, alone[1]);
}
