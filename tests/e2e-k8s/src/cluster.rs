//! The cluster under test, as `cargo xtask e2e` hands it over.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::Duration,
};

use k8s_openapi::api::core::v1::Node;

use crate::{
    command::{self, CommandError},
    kubectl::Kubectl,
    scripts::Scripts,
};

/// helm waits for its own bound, which is shorter, and then tidies up.
const HELM_LIMIT: Duration = Duration::from_secs(240);

/// Programs and names; read once from the environment.
#[derive(Debug)]
pub struct Cluster {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    helm: PathBuf,
    image: String,
    scripts: Option<Scripts>,
    keda: Option<PathBuf>,
}

/// The cluster of this run.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: LazyLock<Cluster> = LazyLock::new(Cluster::from_environment);
    &CLUSTER
}

impl Cluster {
    fn from_environment() -> Self {
        let path = |name: &str| -> Option<PathBuf> { std::env::var_os(name).map(PathBuf::from) };
        let kubeconfig = path("KUBECONFIG").filter(|path| path.is_file());
        Self {
            kubeconfig: kubeconfig.expect("KUBECONFIG names a file: `cargo xtask e2e` runs these tests"),
            kubectl: path("CADRE_KUBECTL").unwrap_or_else(|| "kubectl".into()),
            helm: path("CADRE_HELM").unwrap_or_else(|| "helm".into()),
            image: std::env::var("CADRE_IMAGE").unwrap_or_else(|_| cadre_k8s_api::IMAGE.to_owned()),
            scripts: path("CADRE_CLUSTER_DIR").map(Scripts::in_folder),
            keda: path("CADRE_KEDA_CRD"),
        }
    }

    /// The image under test.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The kubeconfig's path.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// What only a cluster of ours can do.
    pub fn scripts(&self) -> Option<&Scripts> {
        self.scripts.as_ref()
    }

    /// Where kubectl is.
    pub fn kubectl_program(&self) -> &Path {
        &self.kubectl
    }

    /// Where helm is.
    pub fn helm_program(&self) -> &Path {
        &self.helm
    }

    /// KEDA's definition of its ScaledObject, for a cluster that may be taught it.
    pub fn keda(&self) -> Option<&Path> {
        self.keda.as_deref()
    }

    /// The scripts, or a notice that `test` shows nothing on this cluster.
    pub fn scripts_or_notice(&self, test: &str) -> Option<&Scripts> {
        if self.scripts.is_none() {
            #[allow(clippy::print_stdout, reason = "the runner collects notices from the output")]
            {
                println!("NOTICE: not shown on this cluster, CADRE_CLUSTER_DIR is not set: {test}");
            }
        }
        self.scripts.as_ref()
    }

    /// Names of the nodes that take any pod.
    #[track_caller]
    pub fn nodes(&self) -> Vec<String> {
        let nodes: Vec<Node> =
            Kubectl::cluster_wide().list(&["nodes"]).unwrap_or_else(|error| panic!("{error}"));
        let is_open = |node: &Node| {
            let spec = node.spec.clone().unwrap_or_default();
            let taints = spec.taints.unwrap_or_default();
            !spec.unschedulable.unwrap_or_default()
                && taints.iter().all(|taint| taint.effect == "PreferNoSchedule")
        };
        nodes.into_iter().filter(is_open).filter_map(|node| node.metadata.name).collect()
    }

    /// A kubectl of this cluster.
    pub(crate) fn kubectl(&self) -> Command {
        self.program(&self.kubectl)
    }

    /// Runs helm.
    pub fn helm(&self, args: &[&str]) -> Result<String, CommandError> {
        command::run(self.program(&self.helm).args(args), None, HELM_LIMIT)
    }

    /// Runs helm, which must succeed.
    #[track_caller]
    pub fn must_helm(&self, args: &[&str]) -> String {
        self.helm(args).unwrap_or_else(|error| panic!("{error}"))
    }

    fn program(&self, path: &Path) -> Command {
        let mut command = Command::new(path);
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }
}
