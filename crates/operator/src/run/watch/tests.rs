#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_telemetry::Metrics;
use futures::stream;
use k8s_openapi::api::core::v1::Pod;
use kube::core::Status;
use serde_json::{Value, json};
use std::sync::Mutex;
use tokio::time::Instant;

use super::*;
use crate::run::{
    client::Pressure,
    lease::Renewals,
    stores::labelled,
    testing::{Server, api, pod},
};

fn gone() -> watcher::Error {
    watcher::Error::WatchError(Status::failure("too old resource version", "Expired").with_code(410).boxed())
}

/// Follows events to their end; returns the names of what changed, in order.
async fn follow(
    store: &Store<Pod>,
    events: Vec<watcher::Result<Event<Pod>>>,
) -> (Vec<String>, OperatorMetrics) {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let synced = Synced::new(Readiness::new(&[(CACHES, "not yet")]));
    synced.expect("pods");
    let feed = Feed {
        kind: "pods",
        namespace: None,
        store: store.clone(),
        slim: |_| {},
        restarts: metrics.watch_restarts("pods"),
        errors: metrics.watch_errors("pods"),
        synced,
    };
    let told = Mutex::new(Vec::new());
    let tell = |change: Change<Pod>| {
        let name = change.sides().next().map(ResourceExt::name_any).unwrap();
        let sign = if change.new.is_some() { '+' } else { '-' };
        told.lock().unwrap().push(format!("{sign}{name}"));
    };
    feed.run(stream::iter(events), tell).await;
    (told.into_inner().unwrap(), metrics)
}

#[tokio::test(start_paused = true)]
async fn a_lost_delete_is_repaired_by_the_next_list() {
    let store = Store::new(labelled);
    let (told, metrics) = follow(
        &store,
        vec![
            Ok(Event::Init),
            Ok(Event::InitApply(pod("a", "1"))),
            Ok(Event::InitApply(pod("b", "2"))),
            Ok(Event::InitDone),
            Ok(Event::Apply(pod("c", "3"))),
            // While no watch was up, b was deleted and a changed.
            Err(gone()),
            Ok(Event::Init),
            Ok(Event::InitApply(pod("a", "5"))),
            Ok(Event::InitApply(pod("c", "3"))),
            Ok(Event::InitDone),
        ],
    )
    .await;
    assert_eq!(told, ["+a", "+b", "+c", "-b", "+a"]);
    assert!(store.get("ns", "b").is_none());
    assert_eq!((metrics.watch_restarts("pods").get(), metrics.watch_errors("pods").get()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_changes_nothing() {
    let store = Store::new(labelled);
    let failed = || Err(watcher::Error::NoResourceVersion);
    let (told, metrics) = follow(
        &store,
        vec![
            Ok(Event::Init),
            Ok(Event::InitApply(pod("a", "1"))),
            Ok(Event::InitDone),
            Err(gone()),
            Ok(Event::Init),
            Ok(Event::InitApply(pod("b", "2"))),
            failed(),
            Ok(Event::Init),
            Ok(Event::InitApply(pod("a", "1"))),
            Ok(Event::InitDone),
        ],
    )
    .await;
    assert_eq!(told, ["+a"], "half a list is none");
    assert_eq!(metrics.watch_restarts("pods").get(), 1, "one relist, in two attempts");
}

#[tokio::test(start_paused = true)]
async fn the_back_off_grows_while_lists_fail() {
    let attempts = (0..8).flat_map(|_| [Ok(Event::Init), Err(watcher::Error::NoResourceVersion)]).collect();
    let started = Instant::now();
    follow(&Store::new(labelled), attempts).await;
    // 0.2 + 0.4 + 0.8 + 1.6 + 3.2 + 5 + 5 + 5, and up to a quarter more.
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(21_200) && waited <= Duration::from_millis(26_600), "{waited:?}");
}

/// All watches over a played server.
struct Rig {
    server: Server,
    stores: Stores,
    queue: Arc<Queue>,
    readiness: Readiness,
    synced: Synced,
    _tasks: JoinSet<()>,
}

fn rig(namespaces: &[&str]) -> Rig {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let (client, server) = api(&metrics, &Pressure::default(), &Renewals::default());
    let readiness = Readiness::new(&[(CACHES, "not yet")]);
    let (stores, queue) = (Stores::new(), Arc::new(Queue::new(metrics.due.clone())));
    let synced = Synced::new(readiness.clone());
    let namespaces = namespaces.iter().map(|namespace| (*namespace).to_owned()).collect();
    let watches = Watches {
        client,
        namespaces,
        stores: stores.clone(),
        queue: queue.clone(),
        metrics,
        synced: synced.clone(),
    };
    Rig { server, stores, queue, readiness, synced, _tasks: watches.start() }
}

fn list(items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "100"}, "items": items})
}

fn pod_json(name: &str, resource_version: &str) -> Value {
    serde_json::to_value(pod(name, resource_version)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_goes_on_and_one_that_is_too_old_lists_again() {
    let mut rig = rig(&[]);
    let mut kept = Vec::new();
    let mut listed = 0;
    // Everything but pods is empty, and its watches stay open.
    let mut pods = loop {
        let call = rig.server.next().await;
        match (call.is_watch(), call.path == "/api/v1/pods") {
            (false, true) => break call,
            (false, false) => {
                listed += 1;
                call.ok(list(&[]));
            }
            (true, _) => kept.push(call),
        }
    };
    assert!(pods.query.contains("labelSelector=cadre.dev%2Fmodel"), "{}", pods.query);
    assert!(!rig.readiness.is_ready(), "pods are missing");
    pods.ok(list(&[pod_json("a", "90"), pod_json("b", "91")]));
    let next = async |server: &mut Server, kept: &mut Vec<_>, listed: &mut usize| loop {
        let call = server.next().await;
        match (call.is_watch(), call.path == "/api/v1/pods") {
            (_, true) => break call,
            (false, false) => {
                *listed += 1;
                call.ok(list(&[]));
            }
            (true, false) => kept.push(call),
        }
    };
    pods = next(&mut rig.server, &mut kept, &mut listed).await;
    assert!(pods.is_watch() && pods.query.contains("resourceVersion=100"), "{}", pods.query);
    rig.synced.wait().await;
    assert!(rig.readiness.is_ready());
    assert_eq!(listed, KINDS, "every kind is listed once, events for each of two reasons");

    // The connection drops after one event: the watch goes on from there, and nothing is listed.
    pods.events(&[json!({"type": "MODIFIED", "object": pod_json("a", "110")})]);
    pods = next(&mut rig.server, &mut kept, &mut listed).await;
    assert!(pods.is_watch() && pods.query.contains("resourceVersion=110"), "{}", pods.query);
    // Too old: the list that follows has lost b.
    pods.events(&[
        json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": 410, "reason": "Expired", "message": "too old resource version"}}),
    ]);
    pods = next(&mut rig.server, &mut kept, &mut listed).await;
    assert!(!pods.is_watch());
    assert!(rig.stores.pods.get("ns", "b").is_some(), "the store stays as it was until there is better");
    pods.ok(list(&[pod_json("a", "110")]));
    pods = next(&mut rig.server, &mut kept, &mut listed).await;
    assert!(pods.is_watch());
    assert!(rig.stores.pods.get("ns", "b").is_none());
    assert_eq!(listed, KINDS);

    // The model was triggered, once however often.
    let (seen, stop) = (Mutex::new(Vec::new()), tokio::sync::Notify::new());
    rig.queue
        .run(1, stop.notified(), |key| {
            seen.lock().unwrap().push(key);
            stop.notify_one();
            async { None }
        })
        .await;
    assert_eq!(seen.into_inner().unwrap(), [ModelKey::new("ns", "m")]);
}

/// Models, claims and two reasons of events beside the children.
const KINDS: usize = crate::plan::ObjectKind::ALL.len() + 4;

#[tokio::test(start_paused = true)]
async fn namespaces_are_watched_one_by_one_and_nodes_in_the_cluster() {
    let mut rig = rig(&["a", "b"]);
    let mut asked = Vec::new();
    // Nodes have no namespace.
    for _ in 0..2 * KINDS + 1 {
        let call = rig.server.next().await;
        asked.push(call.path.clone());
        drop(call);
    }
    for namespace in ["a", "b"] {
        let within = format!("/namespaces/{namespace}/");
        assert_eq!(asked.iter().filter(|path| path.contains(&within)).count(), KINDS, "{asked:?}");
    }
    assert!(asked.contains(&"/api/v1/nodes".to_owned()));
}
