//! What the authors of models may ask for beyond the model's own pods.
//!
//! Who may create a `MoEModel` gets pods that the operator makes. Whatever in a spec reaches further than those pods
//! (the nodes' files, the scheduler's order among all pods, other accounts' rights, Secrets) is refused unless whoever runs the
//! operator has allowed it: by flags, which the chart's values `models.allow` become. Nothing is allowed by default.

use cadre_k8s_api::{
    Tier,
    model::{MoEModelSpec, PodSpec},
};

/// A list entry that allows everything of its kind.
pub const ANY: &str = "*";

/// What is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Folders of the nodes that may be mounted, with everything below them; `/` is all.
    pub host_paths: Vec<String>,
    /// Priority classes that pods may have; [`ANY`] is all.
    pub priority_classes: Vec<String>,
    /// Service accounts that pods may run as; [`ANY`] is all.
    pub service_accounts: Vec<String>,
    /// Pods may read Secrets of their namespace, as variables and volumes.
    pub secrets: bool,
}

impl Allowed {
    /// Everything, for plans without a cluster: what may be asked for is the operator's to say there.
    pub fn everything() -> Self {
        let any = || vec![ANY.to_owned()];
        Self {
            host_paths: vec!["/".to_owned()],
            priority_classes: any(),
            service_accounts: any(),
            secrets: true,
        }
    }

    /// What of the whole spec is not allowed.
    pub(crate) fn refuses_model(&self, spec: &MoEModelSpec) -> Option<String> {
        let host = spec.model.source.host_path.as_ref()?;
        self.host_path(&host.path).map(|message| format!("spec.model.source.hostPath: {message}"))
    }

    /// What of the router's pods is not allowed.
    pub(crate) fn refuses_router(&self, spec: &MoEModelSpec) -> Option<String> {
        self.pod(&spec.router.pod).map(|message| format!("spec.router.{message}"))
    }

    /// What of a tier's pods is not allowed.
    pub(crate) fn refuses_tier(&self, spec: &MoEModelSpec, tier: Tier) -> Option<String> {
        self.pod(spec.pod(tier)).map(|message| format!("spec.{}.{message}", tier.suffix()))
    }

    fn pod(&self, pod: &PodSpec) -> Option<String> {
        let named = |field: &str, name: &Option<String>, allowed: &[String], value: &str| {
            let name = name.as_ref()?;
            let is_allowed = allowed.iter().any(|one| one == ANY || one == name);
            (!is_allowed).then(|| {
                format!(
                    "{field}: {name} is not among what the operator allows ({}; chart value {value})",
                    list(allowed)
                )
            })
        };
        named(
            "priorityClassName",
            &pod.priority_class_name,
            &self.priority_classes,
            "models.allow.priorityClasses",
        )
        .or_else(|| {
            named(
                "serviceAccountName",
                &pod.service_account_name,
                &self.service_accounts,
                "models.allow.serviceAccounts",
            )
        })
        .or_else(|| self.volumes(pod))
        .or_else(|| self.variables(pod))
    }

    fn volumes(&self, pod: &PodSpec) -> Option<String> {
        pod.volumes.iter().find_map(|volume| {
            let at = format!("volumes[{}]", volume.name);
            if let Some(host) = &volume.host_path {
                return self.host_path(&host.path).map(|message| format!("{at}.hostPath: {message}"));
            }
            (volume.secret.is_some() && !self.secrets).then(|| format!("{at}.secret: {NO_SECRETS}"))
        })
    }

    fn variables(&self, pod: &PodSpec) -> Option<String> {
        let reads = |source: &cadre_k8s_api::model::VariableSource| source.secret_key_ref.is_some();
        let found = pod.env.iter().find(|variable| variable.value_from.as_ref().is_some_and(reads))?;
        (!self.secrets).then(|| format!("env[{}].valueFrom.secretKeyRef: {NO_SECRETS}", found.name))
    }

    fn host_path(&self, path: &str) -> Option<String> {
        let is_below = |folder: &String| {
            let folder = folder.trim_end_matches('/');
            path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        (!self.host_paths.iter().any(is_below)).then(|| {
            format!(
                "{path} is not below what the operator allows ({}; chart value models.allow.hostPaths)",
                list(&self.host_paths)
            )
        })
    }
}

const NO_SECRETS: &str = "the operator allows no Secrets (chart value models.allow.secrets)";

fn list(allowed: &[String]) -> String {
    if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_allowed_with_all_below_it_and_nothing_beside_it() {
        let allows = |allowed: &[&str], path: &str| {
            let host_paths = allowed.iter().map(|one| (*one).to_owned()).collect();
            Allowed { host_paths, ..Allowed::default() }.host_path(path).is_none()
        };
        assert!(!allows(&[], "/srv"));
        assert!(allows(&["/srv/models"], "/srv/models") && allows(&["/srv/models/"], "/srv/models/a/b"));
        assert!(!allows(&["/srv/models"], "/srv/models-of-others") && !allows(&["/srv/models"], "/srv"));
        assert!(allows(&["/"], "/") && allows(&["/"], "/etc") && allows(&["/a", "/b"], "/b/c"));
    }
}
