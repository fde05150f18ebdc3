//! Membership over the wire.

use cadre_proto::v1;
use cadre_types::NumericsClass;
use tonic::Code;

use crate::{
    cluster::{Cluster, generation, options, report},
    fake_worker::{FakeWorker, Script},
};

fn member(id: &str) -> v1::Report {
    report(id, v1::Role::Both, "127.0.0.1:1".into())
}

fn ids(view: &v1::ClusterView) -> Vec<&str> {
    view.members.iter().map(|member| member.id.as_str()).collect()
}

#[tokio::test]
async fn members_get_the_placement_and_every_change() {
    let cluster = Cluster::bare(options()).await;
    let (first, mut views) = cluster.join(member("w-1")).await.unwrap();
    let view = views.message().await.unwrap().unwrap();
    assert_eq!(ids(&view), ["shard-0", "w-1"]);
    let placement = view.placement.unwrap();
    assert_eq!(
        (placement.epoch, placement.num_experts, placement.layers.len()),
        (1, 32, 5),
        "no MTP layer: nothing drafts"
    );
    assert_eq!(view.generation.unwrap().epoch, 1);

    let (second, _views) = cluster.join(member("w-2")).await.unwrap();
    assert_eq!(ids(&views.message().await.unwrap().unwrap()), ["shard-0", "w-1", "w-2"]);
    let mut draining = second.first.clone();
    draining.member.as_mut().unwrap().state = v1::MemberState::Draining.into();
    second.reports.send(draining).await.unwrap();
    let view = views.message().await.unwrap().unwrap();
    assert_eq!(view.members[2].state(), v1::MemberState::Draining);
    drop((second, _views));
    loop {
        let view = views.message().await.unwrap().unwrap();
        if ids(&view) == ["shard-0", "w-1"] {
            break;
        }
    }
    drop(first);
}

#[tokio::test]
async fn another_generation_is_refused_with_both_named() {
    let cluster = Cluster::bare(options()).await;
    let mut other = member("w-1");
    let fp8 = cadre_types::Generation { numerics: NumericsClass::Fp8, ..generation() };
    other.generation = Some(fp8.into());
    let status = cluster.join(other).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    for word in ["w-1", "fp8", "bf16"] {
        assert!(status.message().contains(word), "{} lacks {word}", status.message());
    }
    let mut nameless = member("");
    nameless.member.as_mut().unwrap().id.clear();
    let status = cluster.join(nameless).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("report.member.id"), "{}", status.message());
}

#[tokio::test]
async fn a_bad_report_ends_the_stream_and_removes_the_member() {
    let cluster = Cluster::bare(options()).await;
    let (joined, mut views) = cluster.join(member("w-1")).await.unwrap();
    views.message().await.unwrap().unwrap();
    let mut bad = joined.first.clone();
    bad.expert_load = vec![v1::LayerLoad { layer: 0, tokens: vec![1] }];
    joined.reports.send(bad).await.unwrap();
    let status = views.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("layer 0"), "{}", status.message());
    let lost = "cadre_router_members_lost_total{cause=\"refused\"}";
    assert_eq!(cluster.metric(lost).await, 1.0);
}

#[tokio::test]
async fn reported_load_is_aggregated_and_readiness_follows_the_shard() {
    let worker = FakeWorker::start(Script::steps(Vec::new())).await;
    let mut cluster = Cluster::bare(options()).await;
    let mut first = report("w-1", v1::Role::Both, worker.address.to_string());
    let (joined, _views) = cluster.join(first.clone()).await.unwrap();
    cluster.ready(true).await;
    let mut tokens = vec![0; 32];
    tokens[5] = 7;
    first.expert_load = vec![v1::LayerLoad { layer: 3, tokens }];
    joined.reports.send(first).await.unwrap();
    let count = async |cluster: &Cluster| {
        let (_, text) = crate::http_client::get(cluster.at.admin, "/expert-load").await;
        let load: cadre_placement::ExpertLoad = serde_json::from_str(&text).unwrap();
        load.layer(cadre_types::LayerId(3)).unwrap()[5]
    };
    while count(&cluster).await != 7 {
        tokio::task::yield_now().await;
    }
    cluster.remove("shard-0");
    cluster.ready(false).await;
    let (status, text) = crate::http_client::get(cluster.at.admin, "/readyz").await;
    assert_eq!(status, 503);
    assert!(text.contains("experts_covered") && text.contains("shards not ready: 0"), "{text}");
}
