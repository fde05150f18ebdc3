#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn view() -> t::ClusterView {
    let epoch = t::PlacementEpoch(9);
    let expert = t::LogicalExpert;
    let layers = vec![
        t::LayerPlacement {
            layer: t::LayerId(1),
            slots: vec![vec![expert(0), expert(2)], vec![expert(1), expert(0)]],
        },
        t::LayerPlacement {
            layer: t::LayerId(2),
            slots: vec![vec![expert(2), expert(1)], vec![expert(0), expert(1)]],
        },
    ];
    let member = |id: &str, role, state| t::Member {
        id: t::MemberId(id.into()),
        role,
        address: format!("{id}:7000"),
        state,
        pod: (id != "a").then(|| t::PodRef { name: format!("pod-{id}"), uid: format!("uid-{id}") }),
    };
    let slots = vec![vec![expert(0), expert(1), expert(2)]];
    let next = [1, 2].map(|layer| t::LayerPlacement { layer: t::LayerId(layer), slots: slots.clone() });
    t::ClusterView {
        generation: t::Generation { model: t::ModelHash([7; 16]), numerics: t::NumericsClass::Fp8, epoch },
        placement: Arc::new(t::Placement::new(epoch, 3, layers).unwrap()),
        next: Some(Arc::new(t::Placement::new(t::PlacementEpoch(10), 3, next.to_vec()).unwrap())),
        oldest_epoch: t::PlacementEpoch(8),
        members: vec![
            member("a", t::Role::Prefill, t::MemberState::Starting),
            member("b", t::Role::Decode, t::MemberState::Ready),
            member("c", t::Role::Both, t::MemberState::Draining),
            member("d", t::Role::Expert(t::ShardIndex(65_535)), t::MemberState::Ready),
        ],
    }
}

#[test]
fn a_view_comes_back_as_it_was_sent() {
    let wire = v1::ClusterView::from(&view());
    assert_eq!(t::ClusterView::try_from(&wire), Ok(view()));
    let plain = t::ClusterView { next: None, ..view() };
    assert_eq!(t::ClusterView::try_from(&v1::ClusterView::from(&plain)), Ok(plain));
}

#[test]
fn every_class_and_reason_comes_back() {
    for class in t::NumericsClass::ALL {
        assert_eq!(numerics(v1::NumericsClass::from(class).into()), Ok(class));
    }
    let reasons = [
        t::FinishReason::Stop,
        t::FinishReason::Length,
        t::FinishReason::Cancelled,
        t::FinishReason::Deadline,
    ];
    for reason in reasons {
        assert_eq!(finish_reason(v1::FinishReason::from(reason).into()), Ok(reason));
    }
    let params = t::SamplingParams {
        temperature: 0.5,
        top_p: 0.25,
        top_k: Some(3),
        min_p: 0.125,
        repetition_penalty: 1.5,
        presence_penalty: -1.0,
        frequency_penalty: 2.0,
        seed: u64::MAX,
        logprobs: Some(0),
    };
    assert_eq!(t::SamplingParams::from(&v1::SamplingParams::from(&params)), params);
}

/// What a view with one change is refused with.
fn refused(change: impl FnOnce(&mut v1::ClusterView)) -> String {
    let mut wire = v1::ClusterView::from(&view());
    change(&mut wire);
    t::ClusterView::try_from(&wire).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused_by_field() {
    let generation = |wire: &mut v1::ClusterView| wire.generation = None;
    assert_eq!(refused(generation), "view.generation: missing");
    assert_eq!(
        refused(|wire| wire.generation.as_mut().unwrap().model_hash = vec![1; 15].into()),
        "generation.model_hash: 15 bytes, expected 16"
    );
    for number in [0, 9] {
        assert_eq!(
            refused(|wire| wire.generation.as_mut().unwrap().numerics = number),
            format!("generation.numerics: unknown value {number}")
        );
        assert_eq!(
            refused(|wire| wire.members[0].role = number),
            format!("member.role: unknown value {number}")
        );
        assert_eq!(
            refused(|wire| wire.members[0].state = number),
            format!("member.state: unknown value {number}")
        );
        assert_eq!(
            finish_reason(number).unwrap_err().to_string(),
            format!("finish_reason: unknown value {number}")
        );
    }
    assert_eq!(
        refused(|wire| wire.members[1].pod.as_mut().unwrap().uid = String::new()),
        "pod.uid: 0 bytes, must be 1..=256"
    );
    assert!(refused(|wire| wire.next.as_mut().unwrap().layers[0].shards.clear()).starts_with("placement: "));
    assert_eq!(refused(|wire| wire.members[3].shard = 65_536), "member.shard: 65536 is out of range");
    let placement = |change: fn(&mut v1::Placement)| refused(|wire| change(wire.placement.as_mut().unwrap()));
    assert_eq!(
        placement(|placement| placement.layers[0].shards[0].experts[0] = 70_000),
        "placement.layers.shards.experts: 70000 is out of range"
    );
    // A number that something is allocated by must not decide how much.
    assert_eq!(
        placement(|placement| placement.num_experts = u32::MAX),
        "placement.num_experts: 4294967295 is out of range"
    );
    let uncovered = placement(|placement| placement.layers[1].shards[1].experts = vec![1]);
    assert_eq!(uncovered, "placement: placement of layer 2: no slot holds expert 0");
}
