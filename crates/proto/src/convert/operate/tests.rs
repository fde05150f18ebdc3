#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn layout() -> t::Layout {
    t::Layout { shards: 4, redundant_slots: 32, min_copies: 2 }
}

fn pod(uid: &str) -> t::PodRef {
    t::PodRef { name: format!("model-{uid}"), uid: uid.into() }
}

fn view() -> t::OperatorView {
    let on = |uid, domain: Option<&str>, withdrawn| t::PodView {
        pod: pod(uid),
        domain: domain.map(str::to_owned),
        withdrawn,
        ips: if withdrawn { Vec::new() } else { vec!["10.0.0.1".into(), "fd00::1".into()] },
    };
    t::OperatorView {
        layout: layout(),
        pods: vec![on("a", Some("node-1"), false), on("b", None, false), on("c", Some("node-2"), true)],
    }
}

fn status() -> t::CoordinatorStatus {
    let member = |id: &str, role, pod| t::MemberStatus {
        member: t::Member {
            id: t::MemberId(id.into()),
            role,
            address: format!("{id}:1"),
            state: t::MemberState::Ready,
            pod,
        },
        routable: id == "x",
        applied: t::PlacementEpoch(3),
        loading: (id == "x").then_some(t::LoadProgress { bytes_read: 5, bytes_expected: 9 }),
        sequences: 7,
        failed_proof: (id == "y").then(|| "a row was not finite".to_owned()),
        stranger: (id == "y").then(|| "it has no pod".to_owned()),
        device: (id == "x").then(|| t::MemberDevice {
            device: "cuda:0".into(),
            name: "NVIDIA H200".into(),
            architecture: "sm_90".into(),
            memory_used: 1 << 36,
            memory_total: 1 << 37,
        }),
    };
    t::CoordinatorStatus {
        generation: t::Generation {
            model: t::ModelHash([3; 16]),
            numerics: t::NumericsClass::F32,
            epoch: t::PlacementEpoch(3),
        },
        layout: layout(),
        next: Some(t::NextLayout {
            layout: t::Layout { shards: 8, ..layout() },
            epoch: None,
            waiting_for: "shard 7".into(),
        }),
        members: vec![
            member("x", t::Role::Expert(t::ShardIndex(1)), Some(pod("a"))),
            member("y", t::Role::Both, None),
        ],
        coverage: t::Coverage {
            experts: 512,
            uncovered: 1,
            at_risk: 2,
            examples: vec![t::CoverageExample {
                layer: t::LayerId(3),
                expert: t::LogicalExpert(17),
                copies: 0,
                reason: "no routable copy".into(),
            }],
        },
        imbalance: Some(1.25),
        serving: true,
    }
}

#[test]
fn views_and_statuses_come_back_as_they_were_sent() {
    assert_eq!(t::OperatorView::try_from(&v1::OperatorView::from(&view())), Ok(view()));
    assert_eq!(t::CoordinatorStatus::try_from(&v1::CoordinatorStatus::from(&status())), Ok(status()));
    let epoch = Some(t::PlacementEpoch(4));
    let planned = t::CoordinatorStatus {
        next: status().next.map(|next| t::NextLayout { epoch, ..next }),
        imbalance: None,
        serving: false,
        ..status()
    };
    assert_eq!(t::CoordinatorStatus::try_from(&v1::CoordinatorStatus::from(&planned)), Ok(planned));
    let settled = t::CoordinatorStatus { next: None, ..status() };
    assert_eq!(t::CoordinatorStatus::try_from(&v1::CoordinatorStatus::from(&settled)), Ok(settled));
}

#[test]
fn pods_are_sorted_by_uid() {
    let mut wire = v1::OperatorView::from(&view());
    wire.pods.reverse();
    assert_eq!(t::OperatorView::try_from(&wire), Ok(view()));
}

/// What a view with one change is refused with.
fn refused(change: impl FnOnce(&mut v1::OperatorView)) -> String {
    let mut wire = v1::OperatorView::from(&view());
    change(&mut wire);
    t::OperatorView::try_from(&wire).unwrap_err().to_string()
}

#[test]
fn a_view_that_does_not_fit_is_refused_by_field() {
    assert_eq!(refused(|wire| wire.layout = None), "operator_view.layout: missing");
    assert_eq!(refused(|wire| wire.pods[1].pod = None), "operator_view.pods.pod: missing");
    let layout = |change: fn(&mut v1::Layout)| refused(|wire| change(wire.layout.as_mut().unwrap()));
    assert_eq!(layout(|layout| layout.shards = 0), "layout.shards: 0, must be at least 1");
    assert_eq!(layout(|layout| layout.shards = 65_536), "layout.shards: 65536 is out of range");
    assert_eq!(layout(|layout| layout.min_copies = 0), "layout.min_copies: 0, must be at least 1");
    let long = refused(|wire| wire.pods[0].domain = "x".repeat(257));
    assert_eq!(long, "operator_view.pods.domain: 257 bytes, must be 0..=256");
    let twice = refused(|wire| wire.pods[2].pod.as_mut().unwrap().uid = "a".into());
    assert_eq!(twice, "operator_view.pods: uid a is there twice");
}

#[test]
fn a_status_that_does_not_fit_is_refused_by_field() {
    let refused = |change: fn(&mut v1::CoordinatorStatus)| {
        let mut wire = v1::CoordinatorStatus::from(&status());
        change(&mut wire);
        t::CoordinatorStatus::try_from(&wire).unwrap_err().to_string()
    };
    assert_eq!(refused(|wire| wire.generation = None), "status.generation: missing");
    assert_eq!(refused(|wire| wire.coverage = None), "status.coverage: missing");
    assert_eq!(refused(|wire| wire.members[0].member = None), "status.members.member: missing");
    assert_eq!(
        refused(|wire| wire.coverage.as_mut().unwrap().examples[0].layer = 65_536),
        "status.coverage.examples.layer: 65536 is out of range"
    );
}
