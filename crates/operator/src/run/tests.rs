#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use cadre_k8s_api::MoEModelStatus;
use serde_json::{Value, json};

use super::{
    testing::{Call, Server, api, model, nothing},
    *,
};

/// An operator over a played server.
struct Rig {
    operator: Operator,
    server: Server,
    readiness: Readiness,
    metrics: OperatorMetrics,
}

fn rig(planner: impl Fn(&Observed) -> Plan + Send + Sync + 'static) -> Rig {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let (pressure, renewals) = (Pressure::default(), Renewals::default());
    let (api, server) = api(&metrics, &pressure, &renewals);
    let clients = Clients { lease: api.clone(), api, renewals, pressure, namespace: "cadre".into() };
    let options = OperatorOptions {
        namespaces: Vec::new(),
        identity: "us".into(),
        lease: Some(LeaseOptions { namespace: None, name: "operator".into() }),
        default_image: "image:1".into(),
        pod_namespace: Some("cadre".into()),
        allowed: Allowed::default(),
        key: "key".into(),
        admin: ([127, 0, 0, 1], 0).into(),
        concurrency: NonZeroUsize::MIN,
        coordinator: CoordinatorAddress::new(|_, _| "127.0.0.1:1".into()),
        bound: None,
    };
    let readiness = Readiness::new(&[(CACHES, "not yet")]);
    let operator = Operator::new(options, Arc::new(planner), clients, metrics.clone(), readiness.clone());
    Rig { operator, server, readiness, metrics }
}

/// Base64 of a key.
const SEVENS: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

/// Plays Secrets, lists (there is one model), watches and the lease.
struct Play {
    server: Server,
    lease: Value,
    /// Open watches, by path.
    watches: BTreeMap<String, Call>,
    /// The lease is not answered any more.
    away: bool,
}

impl Play {
    fn new(server: Server) -> Self {
        Self {
            server,
            lease: json!({"metadata": {"name": "operator"}}),
            watches: BTreeMap::new(),
            away: false,
        }
    }

    /// The next call that is none of those.
    async fn next(&mut self) -> Call {
        loop {
            let call = self.server.next().await;
            if call.path.contains("/leases") {
                self.lease(call);
            } else if call.path.contains("/secrets") {
                match call.method.as_str() {
                    "GET" => call.ok(json!({"metadata": {"name": "key"}, "data": {"key": SEVENS}})),
                    _ => call.fail(409, "AlreadyExists", "it is there"),
                }
            } else if call.is_watch() {
                self.watches.insert(format!("{}?{}", call.path, call.query), call);
            } else if call.method == "GET" {
                let items = match call.path.as_str() {
                    "/apis/cadre.dev/v1alpha1/moemodels" => vec![serde_json::to_value(model("10")).unwrap()],
                    _ => Vec::new(),
                };
                call.ok(json!({"metadata": {"resourceVersion": "100"}, "items": items}));
            } else {
                return call;
            }
        }
    }

    fn lease(&mut self, call: Call) {
        if self.away {
            return call.break_off();
        }
        if let Some(changes) = call.body["spec"].as_object() {
            for (key, value) in changes.clone() {
                self.lease["spec"][key] = value;
            }
        }
        let lease = self.lease.clone();
        call.ok(lease);
    }
}

fn plan(_: &Observed) -> Plan {
    Plan {
        status: Some(MoEModelStatus { placement_epoch: Some(1), ..MoEModelStatus::default() }),
        ..nothing()
    }
}

#[tokio::test(start_paused = true)]
async fn it_lists_takes_the_lease_reconciles_and_releases_when_asked_to_stop() {
    let Rig { operator, server, readiness, metrics } = rig(plan);
    let (stop, stopped) = oneshot::channel::<()>();
    let mut running = tokio::spawn(operator.run(async { drop(stopped.await) }));
    let mut play = Play::new(server);
    let call = play.next().await;
    assert_eq!(call.line(), "PATCH /apis/cadre.dev/v1alpha1/namespaces/ns/moemodels/m/status");
    assert!(readiness.is_ready());
    assert_eq!(play.lease["spec"]["holderIdentity"], "us");
    assert_eq!((metrics.leader.get(), metrics.models.get()), (1.0, 1.0));

    // What is in hand is finished; then the lease is free.
    stop.send(()).unwrap();
    call.applied("11");
    let result = tokio::select! {
        biased;
        result = &mut running => result,
        call = play.next() => panic!("{} after the end", call.line()),
    };
    result.unwrap().unwrap();
    assert_eq!(play.lease["spec"]["holderIdentity"], Value::Null);
    assert_eq!(metrics.leader.get(), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_loses_its_lease_stops_in_the_middle_and_ends_with_an_error() {
    let Rig { operator, server, metrics, .. } = rig(plan);
    let mut running = tokio::spawn(operator.run(std::future::pending()));
    let mut play = Play::new(server);
    // A write that is not answered is in hand.
    let _unanswered = play.next().await;
    play.away = true;
    let result = tokio::select! {
        biased;
        result = &mut running => result,
        call = play.next() => panic!("{} without the lease", call.line()),
    };
    let error = result.unwrap().unwrap_err();
    assert!(matches!(error, OperatorError::LeaseLost { .. }), "{error}");
    assert_eq!(metrics.leader.get(), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_standby_is_ready_and_writes_nothing() {
    let Rig { operator, server, readiness, metrics } = rig(plan);
    let (stop, stopped) = oneshot::channel::<()>();
    let mut running = tokio::spawn(operator.run(async { drop(stopped.await) }));
    let mut play = Play::new(server);
    let now = k8s_openapi::jiff::Timestamp::now();
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(now);
    play.lease["spec"] = json!({"holderIdentity": "them", "leaseDurationSeconds": 3600, "renewTime": now});
    let idle = tokio::time::timeout(Duration::from_secs(50), play.next()).await;
    assert!(idle.is_err(), "a standby wrote");
    assert!(readiness.is_ready());
    assert_eq!((metrics.leader.get(), metrics.models.get()), (0.0, 1.0));
    stop.send(()).unwrap();
    let result = tokio::select! {
        biased;
        result = &mut running => result,
        call = play.next() => panic!("{} from a standby", call.line()),
    };
    result.unwrap().unwrap();
    assert_eq!(play.lease["spec"]["holderIdentity"], "them");
}
