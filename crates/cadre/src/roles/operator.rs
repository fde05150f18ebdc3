//! `cadre operator`, and `cadre operator plan`: what it would do, without a cluster.

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cadre_device::Device;
use cadre_k8s_api::{
    IMAGE, MoEModel,
    manifest::{self, Document},
};
use cadre_operator::{Allowed, CoordinatorAddress, LeaseOptions, OperatorOptions, plan};
use cadre_telemetry::{LogFormat, init_logging};
use clap::{Args, Subcommand};

use super::{TERMINATION_LOG_ENV, announce, ended, loopback};
use crate::{output, stop};

/// Makes clusters of MoEModel objects and keeps them as specified.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct OperatorArgs {
    #[command(subcommand)]
    command: Option<OperatorCommand>,
    /// Serve the models of this namespace; several by commas. [default: all namespaces]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    namespace: Vec<String>,
    /// Image of pods whose model names none.
    #[arg(long, value_name = "IMAGE", env = "CADRE_IMAGE", default_value = IMAGE)]
    image: String,
    /// Folder of the nodes that models may mount, with all below it; several by commas. [default: none]
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    allow_host_path: Vec<String>,
    /// Priority class that pods of models may have, or * for all; several by commas. [default: none]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allow_priority_class: Vec<String>,
    /// Service account that pods of models may run as, or * for all; several by commas. [default: none]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allow_service_account: Vec<String>,
    /// Let models put Secrets of their namespace into their pods.
    #[arg(long)]
    allow_secrets: bool,
    /// Secret with the key of the models' cluster secrets, in the namespace of the lease; drawn if there is none.
    #[arg(long, value_name = "NAME", default_value = "cadre-operator-key")]
    key: String,
    /// Namespace of the operator's pod, which NetworkPolicies of models let in. [default: any]
    #[arg(long, value_name = "NAME", env = "CADRE_POD_NAMESPACE")]
    pod_namespace: Option<String>,
    /// Name among the replicas of the operator. [default: host name and process id]
    #[arg(long, value_name = "NAME", env = "CADRE_POD_NAME")]
    identity: Option<String>,
    /// Lease of the replica that works.
    #[arg(long, value_name = "NAME", default_value = "cadre-operator")]
    lease: String,
    /// Namespace of the lease. [default: the pod's, or the kubeconfig's]
    #[arg(long, value_name = "NAME")]
    lease_namespace: Option<String>,
    /// Work without a lease. Two operators at once would do the work of one twice.
    #[arg(long, conflicts_with_all = ["lease", "lease_namespace"])]
    no_leader_election: bool,
    /// Models reconciled at one time.
    #[arg(long, value_name = "N", default_value = "4")]
    concurrency: NonZeroUsize,
    /// Where a model's coordinator is, with {name} and {namespace} in it. [default: its Service in the cluster]
    #[arg(long, value_name = "ADDR")]
    coordinator_address: Option<String>,
    /// Where to serve metrics, health and readiness.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(9090))]
    admin: SocketAddr,
    /// Log filter (`info`, `warn,cadre_operator=debug`).
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log lines as text for people or as json for collectors.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Where to write one line, `Reason: message`, when the process ends with an error.
    #[arg(long, value_name = "FILE", env = TERMINATION_LOG_ENV)]
    termination_log: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
enum OperatorCommand {
    Plan(PlanArgs),
}

/// Prints what would be done for the models of a file, without a cluster.
#[derive(Args, Debug)]
struct PlanArgs {
    /// A file of manifests; every MoEModel in it is checked as an API server does and planned.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Image of pods whose model names none.
    #[arg(long, value_name = "IMAGE", env = "CADRE_IMAGE", default_value = IMAGE)]
    image: String,
    /// Print the objects themselves as YAML.
    #[arg(long)]
    yaml: bool,
}

impl OperatorArgs {
    fn options(self) -> OperatorOptions {
        let lease = LeaseOptions { namespace: self.lease_namespace, name: self.lease };
        OperatorOptions {
            namespaces: self.namespace,
            identity: self.identity.unwrap_or_else(own_name),
            lease: (!self.no_leader_election).then_some(lease),
            default_image: self.image,
            pod_namespace: self.pod_namespace,
            allowed: Allowed {
                host_paths: self.allow_host_path,
                priority_classes: self.allow_priority_class,
                service_accounts: self.allow_service_account,
                secrets: self.allow_secrets,
            },
            key: self.key,
            admin: self.admin,
            concurrency: self.concurrency,
            coordinator: self.coordinator_address.map(CoordinatorAddress::template).unwrap_or_default(),
            bound: Some(announce()),
        }
    }
}

/// Runs the operator until it is asked to stop, or prints a plan.
pub(crate) async fn operator(args: OperatorArgs) -> Result<()> {
    if let Some(OperatorCommand::Plan(args)) = &args.command {
        return print_plan(args);
    }
    let log = args.termination_log.clone();
    init_logging(args.log_format, "operator", &args.log)?;
    super::raise_descriptors();
    let requested = stop::requested(false)?;
    let stop = async move {
        let cause = requested.await;
        tracing::info!(cause, "asked to stop");
    };
    ended(cadre_operator::run(args.options(), stop).await, "operator", log.as_deref(), Some(Device::Cpu))
}

/// Two processes of one host differ, and so do two lives of a process.
fn own_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!(
        "{}-{}",
        Some(host.trim()).filter(|host| !host.is_empty()).unwrap_or("cadre-operator"),
        std::process::id()
    )
}

fn print_plan(args: &PlanArgs) -> Result<()> {
    let models = models(&args.file)?;
    ensure!(!models.is_empty(), "{} has no MoEModel", args.file.display());
    for model in models {
        let name = model.metadata.name.clone().unwrap_or_default();
        let plan = plan::preview(model, &args.image);
        let text = match args.yaml {
            true => plan::manifests(&plan).with_context(|| format!("MoEModel {name}"))?,
            false => format!("MoEModel {name}:\n{}", plan::render(&plan)),
        };
        output::line(text.trim_end());
    }
    Ok(())
}

fn models(file: &Path) -> Result<Vec<MoEModel>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let documents = manifest::read(&text).with_context(|| file.display().to_string())?;
    let model = |document| match document {
        Document::Model(model) => Some(*model),
        Document::Other { .. } => None,
    };
    Ok(documents.into_iter().filter_map(model).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use clap::{CommandFactory, Parser};
    use serde_json::Value;

    use super::*;
    use crate::cli::Cli;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: OperatorArgs,
    }

    fn parsed(line: &[&str]) -> OperatorArgs {
        Line::try_parse_from(std::iter::once(&"operator").chain(line)).unwrap().args
    }

    #[tokio::test]
    async fn flags_become_options() {
        let options =
            parsed(&["--namespace", "a,b", "--lease-namespace", "cadre", "--identity", "us"]).options();
        assert_eq!(options.namespaces, ["a", "b"]);
        let lease = LeaseOptions { namespace: Some("cadre".into()), name: "cadre-operator".into() };
        assert_eq!((options.lease, options.identity.as_str()), (Some(lease), "us"));
        assert_eq!(options.allowed, Allowed::default(), "nothing is allowed by default");
        let allowing =
            ["--allow-host-path", "/srv/a,/srv/b", "--allow-priority-class", "high", "--allow-secrets"];
        let allowed = parsed(&allowing).options().allowed;
        assert_eq!((allowed.host_paths.len(), allowed.priority_classes.len(), allowed.secrets), (2, 1, true));
        let options = parsed(&["--no-leader-election"]).options();
        assert_eq!((options.lease, options.namespaces.len()), (None, 0));
        assert!(Line::try_parse_from(["operator", "--no-leader-election", "--lease", "x"]).is_err());
        assert!(Line::try_parse_from(["operator", "--admin", "[::]:1", "plan", "-f", "x"]).is_err());
    }

    #[test]
    fn the_samples_can_be_planned_and_what_is_no_model_is_skipped() {
        let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/samples");
        assert_eq!(models(&samples.join("pocket.yaml")).unwrap().len(), 1);
        for sample in ["pocket.yaml", "deepseek-v3-pools.yaml"] {
            let args = PlanArgs { file: samples.join(sample), image: "image:1".into(), yaml: false };
            print_plan(&args).unwrap();
        }
        let nothing = PlanArgs { file: samples.join("hpa.yaml"), image: "image:1".into(), yaml: false };
        assert!(print_plan(&nothing).unwrap_err().to_string().contains("has no MoEModel"));
        models(Path::new("/no/such/file")).unwrap_err();
    }

    /// The pod template of every workload that a plan applies, by the workload's name.
    fn pods(plan: &plan::Plan) -> Vec<(String, Value)> {
        let applied = plan.actions.iter().filter_map(|action| match action {
            plan::Action::Apply { object, .. } => Some(serde_json::to_value(object).unwrap()),
            _ => None,
        });
        applied
            .filter(|object| object["kind"] == "Deployment" || object["kind"] == "StatefulSet")
            .map(|object| {
                (object["metadata"]["name"].to_string(), object["spec"]["template"]["spec"].clone())
            })
            .collect()
    }

    /// What NVIDIA's container runtime reads.
    const RUNTIME: [&str; 2] = ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"];

    #[test]
    fn every_pod_of_the_plan_is_started_with_flags_and_variables_that_its_process_has() {
        let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/samples");
        let mut seen = 0;
        for sample in std::fs::read_dir(samples).unwrap() {
            for model in models(&sample.unwrap().path()).unwrap() {
                for (name, pod) in pods(&plan::preview(model, "image:1")) {
                    seen += 1;
                    let container = &pod["containers"][0];
                    let variables = container["env"].as_array().cloned().unwrap_or_default();
                    let all = container.to_string();
                    // A field of the pod is known once it runs.
                    let value_of = |variable: &Value| -> String {
                        match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                            Some("status.podIP") => "fd00::9".to_owned(),
                            Some(_) => "10".to_owned(),
                            None => variable["value"].as_str().unwrap_or("10").to_owned(),
                        }
                    };
                    // The kubelet puts variables into arguments and into each other.
                    let filled = |text: &str| {
                        variables.iter().fold(text.to_owned(), |text, variable| {
                            let reference = format!("$({})", variable["name"].as_str().unwrap());
                            text.replace(&reference, &value_of(variable))
                        })
                    };
                    let mut args: Vec<String> = vec!["cadre".into()];
                    args.extend(
                        container["args"].as_array().unwrap().iter().map(|arg| filled(arg.as_str().unwrap())),
                    );
                    let command = Cli::command();
                    let role = command.find_subcommand(&args[1]).unwrap();
                    for variable in &variables {
                        let name_of = variable["name"].as_str().unwrap();
                        let flag = role
                            .get_arguments()
                            .find(|flag| flag.get_env().is_some_and(|known| known == name_of));
                        match flag.and_then(clap::Arg::get_long) {
                            // As a flag, because a test must not change its own environment.
                            Some(long) => {
                                let value = filled(&value_of(variable));
                                args.extend([format!("--{long}"), value]);
                            }
                            // These are for the node's container runtime.
                            None if RUNTIME.contains(&name_of) => {}
                            // Some are only there to be part of others.
                            None => assert!(all.contains(&format!("$({name_of})")), "{name}: {name_of}"),
                        }
                    }
                    assert!(args.iter().all(|arg| !arg.contains("$(")), "{name}: {args:?}");
                    if let Err(error) = Cli::try_parse_from(&args) {
                        panic!("{name}: {args:?}: {error}");
                    }
                }
            }
        }
        // Router, prefill, decode and shards of pocket and of three models of DeepSeek-V3.
        assert_eq!(seen, 16);
    }
}
