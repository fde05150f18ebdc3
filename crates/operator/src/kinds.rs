//! The kinds of a model's children, each in one row of one table.
//!
//! From a row follow the kind itself, its place among what is observed ([`Children`]), its store and its watch (`run::stores`),
//! how it is found, applied, deleted and counted. What a new kind needs beside its row: a function that renders it
//! (`plan::children`) and a right (`rbac`, whose test names the missing one).
//!
//! Two kinds stand beside the table: tiers, which are found by name whoever owns them, and pods, which are their
//! workloads' children.

use std::fmt::Debug;

use cadre_k8s_api::MoETier;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, StatefulSet},
        core::v1::{ConfigMap, Pod, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Resource,
    core::{ApiResource, DynamicObject, TypeMeta},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Expands a macro over the table: type, name of the lists of it, plural.
macro_rules! child_kinds {
    ($expand:ident) => {
        $expand! {
            /// `apps/v1 Deployment`
            Deployment deployments "deployments";
            /// `apps/v1 StatefulSet`
            StatefulSet stateful_sets "statefulsets";
            /// `v1 Service`
            Service services "services";
            /// `v1 ConfigMap`
            ConfigMap config_maps "configmaps";
            /// `v1 ServiceAccount`
            ServiceAccount service_accounts "serviceaccounts";
            /// `policy/v1 PodDisruptionBudget`
            PodDisruptionBudget disruption_budgets "poddisruptionbudgets";
            /// `networking.k8s.io/v1 NetworkPolicy`
            NetworkPolicy network_policies "networkpolicies";
        }
    };
}
pub(crate) use child_kinds;

/// What every child is, for functions over all of them.
pub(crate) trait ChildObject:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> ChildObject for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

macro_rules! declare {
    ($($(#[$doc:meta])* $kind:ident $field:ident $plural:literal;)+) => {
        /// A kind of child.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ObjectKind {
            /// `cadre.dev/v1alpha1 MoETier`
            Tier,
            $($(#[$doc])* $kind,)+
            /// `v1 Pod`
            Pod,
        }

        impl ObjectKind {
            /// All of them.
            pub const ALL: &'static [Self] = &[Self::Tier, $(Self::$kind,)+ Self::Pod];

            /// Its `kind`.
            pub fn name(self) -> &'static str {
                match self {
                    Self::Tier => "MoETier",
                    $(Self::$kind => stringify!($kind),)+
                    Self::Pod => "Pod",
                }
            }

            /// Its plural, as in paths and rights.
            pub fn plural(self) -> &'static str {
                match self {
                    Self::Tier => "moetiers",
                    $(Self::$kind => $plural,)+
                    Self::Pod => "pods",
                }
            }

            /// Group, version and plural.
            pub(crate) fn resource(self) -> ApiResource {
                match self {
                    Self::Tier => ApiResource::erase::<MoETier>(&()),
                    $(Self::$kind => ApiResource::erase::<$kind>(&()),)+
                    Self::Pod => ApiResource::erase::<Pod>(&()),
                }
            }
        }

        /// The children of a model by kind: objects of the model's names or labels.
        #[derive(Clone, Debug, Default)]
        pub struct Children {
            $($(#[$doc])* pub $field: Vec<$kind>,)+
        }

        impl Children {
            /// The child of this kind and name; `None` also for kinds beside the table.
            pub(crate) fn find(&self, kind: ObjectKind, name: &str) -> Option<(&ObjectMeta, Value)> {
                match kind {
                    $(ObjectKind::$kind => find(&self.$field, name),)+
                    ObjectKind::Tier | ObjectKind::Pod => None,
                }
            }

            /// Kind and metadata of every one.
            pub(crate) fn metas(&self) -> impl Iterator<Item = (ObjectKind, &ObjectMeta)> {
                std::iter::empty()$(.chain(
                    self.$field.iter().map(|object| (ObjectKind::$kind, object.meta())),
                ))+
            }

            /// One more. What cannot be read as its kind is left out.
            pub(crate) fn add(&mut self, kind: ObjectKind, object: DynamicObject) {
                match kind {
                    $(ObjectKind::$kind => self.$field.extend(object.try_parse().ok()),)+
                    ObjectKind::Tier | ObjectKind::Pod => {}
                }
            }

            /// The list of a kind of the table, for tests that play the API server.
            #[cfg(test)]
            pub(crate) fn visit(&mut self, kind: ObjectKind, visitor: impl VisitList) {
                match kind {
                    $(ObjectKind::$kind => visitor.list(&mut self.$field),)+
                    ObjectKind::Tier | ObjectKind::Pod => panic!("{} has no list", kind.name()),
                }
            }
        }
    };
}
child_kinds!(declare);

/// A function over lists of any kind.
#[cfg(test)]
pub(crate) trait VisitList {
    fn list<K: ChildObject>(self, list: &mut Vec<K>);
}

fn find<'a, K: ChildObject>(all: &'a [K], name: &str) -> Option<(&'a ObjectMeta, Value)> {
    let found = all.iter().find(|object| object.meta().name.as_deref() == Some(name))?;
    Some((found.meta(), serde_json::to_value(found).ok()?))
}

impl ObjectKind {
    /// The kind that an object says it is.
    pub(crate) fn of(types: &TypeMeta) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| {
            let resource = kind.resource();
            resource.kind == types.kind && resource.api_version == types.api_version
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::path::{Path, PathBuf};

    use super::*;
    use crate::rbac;

    #[test]
    fn every_kind_is_what_the_api_knows_and_may_be_handled() {
        for kind in ObjectKind::ALL {
            let resource = kind.resource();
            assert_eq!((resource.plural.as_str(), resource.kind.as_str()), (kind.plural(), kind.name()));
            let types = TypeMeta { api_version: resource.api_version, kind: resource.kind };
            assert_eq!(ObjectKind::of(&types), Some(*kind));
            let pods: &[&str] = &["list", "watch", "delete"];
            let children: &[&str] = &["get", "list", "watch", "create", "patch", "delete"];
            for verb in if *kind == ObjectKind::Pod { pods } else { children } {
                assert!(rbac::allows(&resource.group, kind.plural(), verb), "{verb} {}", kind.plural());
            }
        }
        assert_eq!(ObjectKind::of(&TypeMeta { api_version: "v1".into(), kind: "Secret".into() }), None);
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension() == Some("rs".as_ref()) {
                found.push(path);
            }
        }
    }

    /// The point of the table: a kind stands here, where it is rendered, and nowhere else.
    #[test]
    fn a_kind_stands_in_the_table_and_where_it_is_rendered() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = Vec::new();
        sources(&src, &mut files);
        for (kind, rendered) in [
            ("PodDisruptionBudget", "plan/children/budgets.rs"),
            ("NetworkPolicy", "plan/children/network.rs"),
            ("ConfigMap", "plan/children/layout.rs"),
            ("ServiceAccount", "plan/children/accounts.rs"),
        ] {
            for file in &files {
                let name = file.strip_prefix(&src).unwrap().to_str().unwrap();
                if name == "kinds.rs" || name == rendered || name.contains("tests") {
                    continue;
                }
                let text = std::fs::read_to_string(file).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                let is_kind = |line: &str| {
                    !line.trim_start().starts_with("//")
                        && line.match_indices(kind).any(|(at, _)| {
                            let next = line[at + kind.len()..].chars().next();
                            !next.is_some_and(|next| next.is_alphanumeric())
                                && !line[..at].ends_with(char::is_alphanumeric)
                        })
                };
                if let Some(line) = code.lines().find(|line| is_kind(line)) {
                    panic!("{name} knows {kind}: {line}");
                }
            }
        }
    }
}
