//! What the operator costs with many pods: `cargo xtask bench-operator`.
//!
//! Pods are simulated (kwok): they are scheduled, run and are ready, but no process is in them. So no coordinator
//! answers and no model becomes Ready; what is measured is the way to all children, and the steady state after it.
//! The operator is a process of this machine beside a control plane without real nodes, so that `/proc` tells its
//! CPU time and memory. Figures go to standard output and to the table `scale` of docs/kubernetes-figures.md.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use cadre_e2e::{binary::cadre, http};
use cadre_e2e_k8s::{Figures, Kubectl, Metrics, cluster, figures, process::Usage, sample};
use cadre_k8s_api::{crd, names::label};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// All children of a case, and their deletion: simulated pods take about 25 ms each.
const LIMIT: Duration = Duration::from_secs(600);
/// Without a write for so long, the operator is done.
const QUIET: Duration = Duration::from_secs(15);
/// How long the steady state is watched.
const WATCHED: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// Everything is in it.
const NAMESPACE: &str = "bench-operator";

/// So many models of one shape.
struct Case {
    name: &'static str,
    models: usize,
    prefill: usize,
    decode: usize,
    shards: usize,
    redundant: usize,
    routed: usize,
    gpus: bool,
}

const CASES: [Case; 2] = [
    Case {
        name: "1 model, 320 shards + 64 workers",
        models: 1,
        prefill: 16,
        decode: 48,
        shards: 320,
        redundant: 64,
        routed: 256,
        gpus: true,
    },
    Case {
        name: "50 models of 20 pods",
        models: 50,
        prefill: 3,
        decode: 8,
        shards: 8,
        redundant: 32,
        routed: 32,
        gpus: false,
    },
];

impl Case {
    /// The router, workers and shards of all models.
    fn pods(&self) -> usize {
        self.models * (1 + self.prefill + self.decode + self.shards)
    }

    fn objects(&self) -> Value {
        let models = (0..self.models).map(|index| self.model(index));
        json!({"apiVersion": "v1", "kind": "List", "items": models.collect::<Vec<_>>()})
    }

    fn model(&self, index: usize) -> Value {
        let simulated = json!({
            "nodeSelector": {"type": "kwok"},
            "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists", "effect": "NoSchedule"}],
        });
        let tier = |more: Value| {
            let gpu = json!({"accelerator": {"resource": "nvidia.com/gpu", "count": 1}});
            let with_gpu = if self.gpus { sample::patched(more, &gpu) } else { more };
            sample::patched(with_gpu, &simulated)
        };
        let patch = json!({
            "metadata": {"name": format!("m{index}"), "namespace": NAMESPACE},
            "spec": {
                "model": {"routedExperts": self.routed},
                "router": simulated,
                "prefill": tier(json!({"replicas": self.prefill})),
                "decode": tier(json!({"replicas": self.decode})),
                "experts": tier(json!({"shards": self.shards, "redundantSlots": self.redundant, "minCopies": 1})),
            },
        });
        sample::patched(sample::plain_pocket(), &patch)
    }
}

fn main() -> Result<()> {
    let kubectl = Kubectl::cluster_wide();
    let definitions = json!({"apiVersion": "v1", "kind": "List", "items": crd::all()});
    kubectl.with_object(&["apply", "--server-side", "-f", "-"], &definitions)?;
    kubectl.run(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"])?;
    figures::describe_run();
    for case in &CASES {
        measure(case).with_context(|| case.name.to_owned())?;
    }
    Ok(())
}

/// One case with an operator of its own.
fn measure(case: &Case) -> Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    Kubectl::cluster_wide().with_object(&["apply", "-f", "-"], &namespace)?;
    let operator = Operator::start()?;
    let kubectl = Kubectl::of(NAMESPACE);

    let begun = Instant::now();
    kubectl.with_object(&["create", "-f", "-"], &case.objects())?;
    let selector = format!("--selector={}", label::MODEL);
    until("all children are there", || {
        let pods = kubectl.run(&["get", "pods", &selector, "--output=name"])?.lines().count();
        Ok(if pods == case.pods() { None } else { Some(format!("{pods} of {} pods", case.pods())) })
    })?;
    let created = begun.elapsed();
    let made = kubectl.run(&["get", CHILDREN, &selector, "--output=name"])?.lines().count();
    operator.until_quiet()?;
    let quiet = begun.elapsed().saturating_sub(QUIET);
    let start = operator.look()?;
    thread::sleep(WATCHED);
    let end = operator.look()?;

    report(case, made, [created, quiet], &start, &end);
    drop(operator);
    Kubectl::cluster_wide().run(&["delete", "namespace", NAMESPACE, "--wait=false"])?;
    until("the namespace is gone", || {
        let left = Kubectl::cluster_wide().run(&["get", "namespace", NAMESPACE, "--ignore-not-found"])?;
        Ok(if left.is_empty() { None } else { Some(left) })
    })
}

/// Children but pods and what workloads make themselves.
const CHILDREN: &str =
    "moetiers,deployments,statefulsets,services,configmaps,serviceaccounts,poddisruptionbudgets";

fn report(case: &Case, made: usize, [created, quiet]: [Duration; 2], start: &Look, end: &Look) {
    let mebibytes = |bytes: u64| format!("{:.0}", bytes as f64 / f64::from(1 << 20));
    let during = (end.reconciles - start.reconciles, end.requests - start.requests);
    let busy = end.usage.cpu.saturating_sub(start.usage.cpu).as_secs_f64() / WATCHED.as_secs_f64();
    let columns = [
        "case",
        "children + pods",
        "s until all are there",
        "s until no write follows",
        "reconciles",
        "API requests",
        "of these writes",
        "requests per reconcile",
        "CPU s",
        "steady: reconciles, requests, writes per min",
        "steady: CPU %",
        "MiB now, most",
    ];
    let cells = [
        format!("{made} + {}", case.pods()),
        figures::seconds(created),
        figures::seconds(quiet),
        format!("{:.0}", start.reconciles),
        format!("{:.0}", start.requests),
        format!("{:.0}", start.writes),
        format!("{:.2}", start.requests / start.reconciles.max(1.0)),
        figures::seconds(start.usage.cpu),
        format!("{:.0}, {:.0}, {:.0}", during.0, during.1, end.writes - start.writes),
        format!("{:.2}", busy * 100.0),
        format!("{}, {}", mebibytes(end.usage.resident), mebibytes(end.usage.most_resident)),
    ];
    for (column, cell) in
        columns.iter().zip(std::iter::once(case.name).chain(cells.iter().map(String::as_str)))
    {
        println!("{column:<46} {cell}");
    }
    println!();
    Figures::new("scale", &columns).row(case.name, &cells);
}

/// What the operator has done so far.
struct Look {
    reconciles: f64,
    /// Without watches, which last.
    requests: f64,
    writes: f64,
    usage: Usage,
}

/// An operator outside the cluster; ends with this value.
struct Operator {
    child: Child,
    admin: String,
    runtime: Runtime,
}

impl Operator {
    fn start() -> Result<Self> {
        let mut child = Command::new(cadre())
            .args(["operator", "--no-leader-election", "--admin", "127.0.0.1:0", "--log", "warn"])
            // Nobody listens there: as simulated pods, which have no coordinator.
            .args(["--coordinator-address", "127.0.0.1:9", "--image", cluster().image()])
            .env("KUBECONFIG", cluster().kubeconfig())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start cadre operator")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        let addresses: Value = serde_json::from_str(&line).with_context(|| format!("it printed {line:?}"))?;
        let admin = addresses["admin"].as_str().context("an admin address")?.to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let operator = Self { child, admin, runtime };
        until("the operator is ready", || {
            let answer = operator.runtime.block_on(http::send("GET", &operator.admin, "/readyz", ""))?;
            Ok(if answer.status.is_success() { None } else { Some(answer.body) })
        })?;
        Ok(operator)
    }

    fn look(&self) -> Result<Look> {
        let text = self.runtime.block_on(http::send("GET", &self.admin, "/metrics", ""))?.body;
        let metrics = Metrics::new(text);
        let requests = "cadre_operator_api_requests_total";
        Ok(Look {
            reconciles: metrics.sum("cadre_operator_reconciles_total", &[]),
            requests: metrics.sum(requests, &[]) - metrics.sum(requests, &["verb=\"watch\""]),
            writes: metrics.operator_writes().values().sum(),
            usage: Usage::of(self.child.id())?,
        })
    }

    /// Waits until nothing was written for [`QUIET`].
    fn until_quiet(&self) -> Result<()> {
        let (mut writes, mut since) = (-1.0, Instant::now());
        until("no write follows", || {
            let now = self.look()?.writes;
            if now != writes {
                (writes, since) = (now, Instant::now());
            }
            Ok((since.elapsed() < QUIET).then(|| format!("{writes} writes")))
        })
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // It may have ended already, which the figures then lack.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks until there is no objection.
fn until(what: &str, mut look: impl FnMut() -> Result<Option<String>>) -> Result<()> {
    let begun = Instant::now();
    while let Some(seen) = look()? {
        if begun.elapsed() > LIMIT {
            bail!("waited {} s in vain: {what}; last seen: {seen}", LIMIT.as_secs());
        }
        thread::sleep(LOOK);
    }
    Ok(())
}
