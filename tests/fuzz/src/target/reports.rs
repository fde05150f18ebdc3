//! What members and operators tell the coordinator. Its state is inside the router's crate, and so is the target.

use cadre_proto::v1;
use cadre_router::fuzzing::{Event, coordinate};
use prost::Message;

use crate::draw::Draw;

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let mut events = Vec::new();
    // As many as let members come, hold a placement, go and come back.
    while !draw.is_empty() && events.len() < 64 {
        events.push(match draw.below(10) {
            0..=2 => Event::Join(report(&mut draw)),
            3 | 4 => Event::Report(draw.below(8), report(&mut draw)),
            5 => Event::Leave(draw.below(8)),
            6 => Event::Wait(draw.number() % 10_000),
            7 => Event::Operate(view(&mut draw)),
            8 => Event::OperatorLeft,
            _ => Event::Proven(draw.below(8)),
        });
    }
    coordinate(events);
}

fn report(draw: &mut Draw<'_>) -> v1::Report {
    if draw.one_in(16) {
        return v1::Report::decode(draw.bytes()).unwrap_or_default();
    }
    let role =
        draw.of(&[v1::Role::Expert, v1::Role::Expert, v1::Role::Decode, v1::Role::Prefill, v1::Role::Both]);
    let shard = match role {
        v1::Role::Expert => draw.number() as u32,
        _ => 0,
    };
    let id = format!("{}-{}", role.as_str_name(), draw.below(4));
    let pod = draw.one_in(4).then(|| pod(draw));
    let state = draw.of(&[v1::MemberState::Ready, v1::MemberState::Starting, v1::MemberState::Draining]);
    let member = v1::Member {
        address: format!("10.0.0.{}:1", draw.below(4)),
        id,
        role: role.into(),
        shard,
        state: state.into(),
        pod,
    };
    let mut report = v1::Report {
        member: Some(member),
        generation: Some(cadre_router::fuzzing::generation(draw.number()).into()),
        // Named by what the coordinator itself says, for a member knows no other.
        placement_digest: draw.number(),
        prepared_digest: draw.number(),
        prepared_epoch: draw.number(),
        ..v1::Report::default()
    };
    while draw.one_in(3) {
        match draw.below(7) {
            0 => report.applied_placement = Some(placement(draw)),
            1 => {
                report.worker = Some(v1::WorkerLoad {
                    running_sequences: draw.number() as u32,
                    waiting_sequences: draw.number() as u32,
                    free_pages: draw.number(),
                    total_pages: draw.number(),
                });
            }
            2 => {
                report.loading =
                    Some(v1::LoadProgress { bytes_read: draw.number(), bytes_expected: draw.number() });
            }
            3 => report.expert_load.push(v1::LayerLoad {
                layer: draw.number() as u32,
                tokens: (0..draw.below(5)).map(|_| draw.number()).collect(),
            }),
            4 => report.expert_digests.push(v1::LayerDigests {
                layer: draw.number() as u32,
                experts: (0..draw.below(5)).map(|_| draw.number() as u32).collect(),
                digests: (0..draw.below(5)).map(|_| draw.number()).collect(),
            }),
            5 => report.weights_digest = draw.number(),
            _ => {
                if let Some(member) = &mut report.member {
                    match draw.below(4) {
                        0 => member.id = String::from_utf8_lossy(draw.bytes()).into_owned(),
                        1 => member.address = String::from_utf8_lossy(draw.bytes()).into_owned(),
                        2 => member.role = draw.number() as i32,
                        _ => member.state = draw.number() as i32,
                    }
                }
            }
        }
    }
    report
}

fn pod(draw: &mut Draw<'_>) -> v1::PodRef {
    let number = draw.below(4);
    v1::PodRef { name: format!("pod-{number}"), uid: format!("uid-{}", draw.below(4)) }
}

fn placement(draw: &mut Draw<'_>) -> v1::Placement {
    let layers = (0..draw.below(4)).map(|_| v1::LayerPlacement {
        layer: draw.number() as u32,
        shards: (0..draw.below(5))
            .map(|_| v1::ShardSlots { experts: (0..draw.below(5)).map(|_| draw.number() as u32).collect() })
            .collect(),
    });
    v1::Placement { layers: layers.collect(), epoch: draw.number(), num_experts: draw.number() as u32 }
}

fn view(draw: &mut Draw<'_>) -> v1::OperatorView {
    if draw.one_in(16) {
        return v1::OperatorView::decode(draw.bytes()).unwrap_or_default();
    }
    let pods = (0..draw.below(6)).map(|_| v1::PodView {
        pod: (!draw.one_in(8)).then(|| pod(draw)),
        domain: draw.of(&["", "a", "b"]).to_owned(),
        withdrawn: draw.one_in(4),
        ips: (0..draw.below(3)).map(|_| format!("10.0.0.{}", draw.below(4))).collect(),
    });
    let pods = pods.collect();
    let layout = v1::Layout {
        shards: draw.number() as u32,
        redundant_slots: draw.number() as u32,
        min_copies: draw.number() as u32,
    };
    v1::OperatorView { layout: (!draw.one_in(8)).then_some(layout), pods }
}
