//! What the operator may do, as data: the chart's roles are checked against it, and the tests of `run` refuse any
//! request that no rule here allows.
//!
//! Least privilege: no wildcard, no reading of Secrets but of the operator's own key, nothing on pods but to withdraw them and to set their gates. Pods of a
//! model need no rights at all (docs/adr/0008), hence no Role is ever created.

use k8s_openapi::api::rbac::v1::PolicyRule;

/// Where a rule must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// In the whole cluster: the kind has no namespace. Always a ClusterRole.
    Cluster,
    /// In every namespace that is watched: a ClusterRole, or a Role in each of them.
    Watched,
    /// In the operator's own namespace: a Role.
    Own,
}

/// Verbs on resources of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where.
    pub scope: Scope,
    /// API group; empty is the core group.
    pub group: &'static str,
    /// Plural names, subresources as `pods/status`.
    pub resources: &'static [&'static str],
    /// What is done with them.
    pub verbs: &'static [&'static str],
    /// Only the object of the operator's own name and this suffix.
    pub only: Option<&'static str>,
    /// What for.
    pub reason: &'static str,
    /// The functions that do it, by file below `crates/operator/src`.
    pub code: &'static str,
}

/// Every rule there is.
pub const RULES: &[Rule] = &[
    Rule {
        scope: Scope::Watched,
        group: "cadre.dev",
        resources: &["moemodels"],
        verbs: &["list", "watch"],
        only: None,
        reason: "The models.",
        code: "run/watch.rs: start",
    },
    Rule {
        scope: Scope::Watched,
        group: "cadre.dev",
        resources: &["moemodels/status", "moetiers/status"],
        verbs: &["patch"],
        only: None,
        reason: "Conditions, replicas and progress.",
        code: "run/execute/status.rs: apply_status",
    },
    Rule {
        scope: Scope::Watched,
        group: "cadre.dev",
        resources: &["moemodels/finalizers"],
        verbs: &["update"],
        only: None,
        reason: "Children that block their owner's deletion, where the admission plugin \
                 OwnerReferencesPermissionEnforcement asks for it.",
        code: "run/execute/children.rs: apply",
    },
    Rule {
        scope: Scope::Watched,
        group: "cadre.dev",
        resources: &["moetiers"],
        verbs: &["get", "list", "watch", "create", "patch", "delete"],
        only: None,
        reason: "The tiers: children that are scaled. `get`: an object of a wanted name that is not ours is looked at \
                 before anything is applied over it.",
        code: "run/watch.rs: start; run/execute/children.rs: apply, delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "apps",
        resources: &["deployments", "statefulsets"],
        verbs: &["get", "list", "watch", "create", "patch", "delete"],
        only: None,
        reason: "Router, workers and shards.",
        code: "run/watch.rs: start; run/execute/children.rs: apply, delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["services", "configmaps", "serviceaccounts"],
        verbs: &["get", "list", "watch", "create", "patch", "delete"],
        only: None,
        reason: "How clients and members find a model, its layout, and the accounts of its pods (which have no rights). \
                 Only objects with the label cadre.dev/model are read.",
        code: "run/watch.rs: start; run/execute/children.rs: apply, delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "policy",
        resources: &["poddisruptionbudgets"],
        verbs: &["get", "list", "watch", "create", "patch", "delete"],
        only: None,
        reason: "Budgets of the tiers.",
        code: "run/watch.rs: start; run/execute/children.rs: apply, delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["secrets"],
        verbs: &["create"],
        only: None,
        reason: "The cluster secret of each model, which is derived and so never read. No Secret of a model's namespace can \
                 be read with this.",
        code: "run/secrets.rs: make",
    },
    Rule {
        scope: Scope::Watched,
        group: "networking.k8s.io",
        resources: &["networkpolicies"],
        verbs: &["get", "list", "watch", "create", "patch", "delete"],
        only: None,
        reason: "Who may connect to a model's pods.",
        code: "run/watch.rs: start; run/execute/children.rs: apply, delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["pods"],
        verbs: &["list", "watch", "delete"],
        only: None,
        reason: "Which pods exist; outdated shards are replaced one by one.",
        code: "run/watch.rs: start; run/execute/children.rs: delete",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["pods/status"],
        verbs: &["patch"],
        only: None,
        reason: "The readiness gate cadre.dev/Routable.",
        code: "run/execute/gate.rs: set_routable",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["persistentvolumeclaims"],
        verbs: &["list", "watch"],
        only: None,
        reason: "The claim of a checkpoint: whether it exists and is bound.",
        code: "run/watch.rs: start",
    },
    Rule {
        scope: Scope::Watched,
        group: "",
        resources: &["events"],
        verbs: &["list", "watch"],
        only: None,
        reason: "Why pods are refused (FailedCreate) or do not start (FailedMount): said nowhere else.",
        code: "run/watch.rs: start",
    },
    Rule {
        scope: Scope::Watched,
        group: "events.k8s.io",
        resources: &["events"],
        verbs: &["create", "patch"],
        only: None,
        reason: "Events of models.",
        code: "run/events.rs: tell",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resources: &["nodes"],
        verbs: &["list", "watch"],
        only: None,
        reason: "Failure domains (labels) and readiness of the nodes that run pods of a model.",
        code: "run/watch.rs: start",
    },
    Rule {
        scope: Scope::Own,
        group: "coordination.k8s.io",
        resources: &["leases"],
        verbs: &["get", "create", "patch"],
        only: None,
        reason: "Leader election.",
        code: "run/lease.rs: attempt, released",
    },
    Rule {
        scope: Scope::Own,
        group: "",
        resources: &["secrets"],
        verbs: &["create"],
        only: None,
        reason: "The key from which cluster secrets are derived is drawn once (a right to create cannot be confined to a name).",
        code: "run/secrets.rs: key",
    },
    Rule {
        scope: Scope::Own,
        group: "",
        resources: &["secrets"],
        verbs: &["get"],
        only: Some("-key"),
        reason: "That key.",
        code: "run/secrets.rs: key",
    },
];

/// The name of the operator's objects unless the chart's values say otherwise.
const NAME: &str = "cadre-operator";

/// The rules of one scope as a Role or ClusterRole has them.
pub fn policy_rules(scope: Scope) -> Vec<PolicyRule> {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let rules = RULES.iter().filter(|rule| rule.scope == scope);
    rules
        .map(|rule| PolicyRule {
            api_groups: Some(vec![rule.group.to_owned()]),
            resources: Some(owned(rule.resources)),
            verbs: owned(rule.verbs),
            resource_names: rule.only.map(|suffix| vec![format!("{NAME}{suffix}")]),
            ..PolicyRule::default()
        })
        .collect()
}

/// The same as a JSON value: the list under `rules:`.
pub fn policy_rules_value(scope: Scope) -> serde_json::Value {
    serde_json::to_value(policy_rules(scope)).expect("names are JSON")
}

/// Whether a rule allows the verb on the resource (`pods/status`) of the group.
pub fn allows(group: &str, resource: &str, verb: &str) -> bool {
    RULES
        .iter()
        .any(|rule| rule.group == group && rule.resources.contains(&resource) && rule.verbs.contains(&verb))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_wildcard_no_reading_of_secrets_and_nothing_twice() {
        let mut seen = BTreeSet::new();
        for rule in RULES {
            for resource in rule.resources {
                assert!(!resource.contains('*'), "{resource}");
                for verb in rule.verbs {
                    assert_ne!(*verb, "*", "{resource}");
                    let reads = *resource == "secrets" && *verb != "create";
                    assert!(!reads || (rule.scope == Scope::Own && rule.only.is_some()), "{verb} {resource}");
                    assert!(
                        seen.insert((rule.scope, rule.group, *resource, *verb)),
                        "{resource} {verb} is there twice"
                    );
                }
            }
        }
    }

    #[test]
    fn the_rendered_rules_are_those_of_the_table() {
        let rendered: usize = [Scope::Cluster, Scope::Watched, Scope::Own]
            .into_iter()
            .map(|scope| policy_rules_value(scope).as_array().map_or(0, Vec::len))
            .sum();
        assert_eq!(rendered, RULES.len());
        let own = policy_rules_value(Scope::Own);
        assert_eq!(own[0]["apiGroups"][0], "coordination.k8s.io");
        assert_eq!(own[0]["verbs"], serde_json::json!(["get", "create", "patch"]));
    }

    #[test]
    fn the_code_that_needs_a_rule_is_where_the_table_says() {
        let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for place in RULES.iter().flat_map(|rule| rule.code.split("; ")) {
            let (file, functions) = place.split_once(": ").expect("file: functions");
            let text = std::fs::read_to_string(src.join(file)).expect(place);
            for function in functions.split(", ") {
                assert!(text.contains(&format!("fn {function}(")), "{place}: no {function}");
            }
        }
    }

    #[test]
    fn only_what_stands_there_is_allowed() {
        assert!(allows("", "pods/status", "patch"));
        assert!(!allows("", "pods", "create"));
        assert!(!allows("apps", "pods", "list"));
    }
}
