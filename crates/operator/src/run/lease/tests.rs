#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use cadre_telemetry::Metrics;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::*;
use crate::run::{
    client::Pressure,
    metrics::OperatorMetrics,
    testing::{Call, Server, api},
};

/// The one object, and whether the server answers.
#[derive(Debug, Default)]
struct Held {
    lease: Value,
    away: bool,
    writes: usize,
}

impl Held {
    /// As an API server would: the manager's patches are merges of a few fields.
    fn answer(&mut self, call: Call) {
        let name = "/apis/coordination.k8s.io/v1/namespaces/cadre/leases";
        assert!(call.path.starts_with(name), "{}", call.path);
        if self.away {
            return call.break_off();
        }
        match call.method.as_str() {
            "GET" if self.lease.is_null() => return call.fail(404, "NotFound", "no such lease"),
            "GET" => {}
            "POST" => self.lease = call.body.clone(),
            "PATCH" => {
                self.writes += 1;
                let spec = &mut self.lease["spec"];
                for (key, value) in call.body["spec"].as_object().unwrap() {
                    if spec.is_null() {
                        *spec = json!({});
                    }
                    match value {
                        Value::Null => drop(spec.as_object_mut().unwrap().remove(key)),
                        value => spec[key] = value.clone(),
                    }
                }
            }
            other => panic!("{other} on a lease"),
        }
        let lease = self.lease.clone();
        call.ok(lease);
    }
}

struct Rig {
    candidate: Candidate,
    held: Arc<Mutex<Held>>,
    server: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn rig(lease: Value) -> Rig {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let renewals = Renewals::default();
    let (client, mut server): (Client, Server) = api(&metrics, &Pressure::default(), &renewals);
    let held = Arc::new(Mutex::new(Held { lease, ..Held::default() }));
    let shared = held.clone();
    let server = tokio::spawn(async move {
        loop {
            let call = server.next().await;
            shared.lock().unwrap().answer(call);
        }
    });
    let (namespace, name, identity) = ("cadre".to_owned(), "operator".to_owned(), "us".to_owned());
    Rig { candidate: Candidate { client, renewals, namespace, name, identity }, held, server }
}

fn held_by(identity: &str) -> Value {
    let now = Timestamp::now() + SignedDuration::from_secs(1);
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(now);
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "operator"},
        "spec": {"holderIdentity": identity, "leaseDurationSeconds": 15, "renewTime": now, "acquireTime": now},
    })
}

fn holder(rig: &Rig) -> Value {
    rig.held.lock().unwrap().lease["spec"]["holderIdentity"].clone()
}

#[tokio::test(start_paused = true)]
async fn a_free_lease_is_taken_renewed_and_given_back() {
    let rig = rig(Value::Null);
    let lease = rig.candidate.acquire().await;
    assert_eq!(holder(&rig), "us");
    let before = rig.held.lock().unwrap().writes;
    // As long as it is renewed it is not lost.
    let kept = tokio::time::timeout(10 * FENCE, lease.lost()).await;
    assert!(kept.is_err(), "{kept:?}");
    assert!(rig.held.lock().unwrap().writes >= before + 10);
    lease.release().await;
    assert_eq!(holder(&rig), Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_cannot_be_renewed_counts_as_lost_before_it_runs_out() {
    let rig = rig(Value::Null);
    let lease = rig.candidate.acquire().await;
    rig.held.lock().unwrap().away = true;
    let away = Instant::now();
    let reason = lease.lost().await;
    assert!(reason.contains("could not be renewed"), "{reason}");
    assert!(away.elapsed() <= FENCE && FENCE < DURATION, "{:?}", away.elapsed());
    // Somebody else may have it now: releasing is not worth waiting for.
    let started = Instant::now();
    lease.release().await;
    assert!(started.elapsed() <= RELEASE_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_took_is_lost_at_the_next_renewal() {
    let rig = rig(Value::Null);
    let lease = rig.candidate.acquire().await;
    rig.held.lock().unwrap().lease = held_by("them");
    let reason = tokio::time::timeout(FENCE, lease.lost()).await.unwrap();
    assert!(reason.contains("another process"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_soon_after_the_leader_gave_the_lease_back() {
    let rig = rig(held_by("them"));
    let acquire = rig.candidate.acquire();
    tokio::pin!(acquire);
    assert!(tokio::time::timeout(Duration::from_secs(9), &mut acquire).await.is_err(), "it is held");
    rig.held.lock().unwrap().lease["spec"] = json!({});
    tokio::time::timeout(2 * RELEASED_EVERY, acquire).await.unwrap();
    assert_eq!(holder(&rig), "us");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_is_waited_for() {
    let rig = rig(Value::Null);
    rig.held.lock().unwrap().away = true;
    let acquire = rig.candidate.acquire();
    tokio::pin!(acquire);
    assert!(tokio::time::timeout(Duration::from_secs(60), &mut acquire).await.is_err());
    rig.held.lock().unwrap().away = false;
    tokio::time::timeout(Duration::from_secs(10), acquire).await.unwrap();
}

#[tokio::test]
async fn a_field_manager_fits_whatever_the_pod_is_called() {
    let mut rig = rig(Value::Null);
    assert_eq!(rig.candidate.field_manager(), "cadre-operator-us");
    rig.candidate.identity = format!("{}-tail", "ü".repeat(200));
    let name = rig.candidate.field_manager();
    assert!(name.len() <= MAX_FIELD_MANAGER && name.ends_with("-tail"), "{name}");
}
