//! The stores of the kinds of children: one for each row of the table.

use k8s_openapi::api::{apps::v1::*, core::v1::*, networking::v1::*, policy::v1::*};

use super::{ModelKey, Store, Version, labelled};
use crate::kinds::{ChildObject, Children, ObjectKind, child_kinds};

/// A function over the stores of every kind.
pub(crate) trait VisitStore {
    /// The store of a kind and its plural.
    fn store<K: ChildObject>(&mut self, plural: &'static str, store: &Store<K>);
}

macro_rules! declare {
    ($($(#[$doc:meta])* $kind:ident $field:ident $plural:literal;)+) => {
        /// One store per kind of child; each holds what has a model's label.
        #[derive(Clone, Debug)]
        pub(crate) struct ChildStores {
            $(pub(crate) $field: Store<$kind>,)+
        }

        impl ChildStores {
            /// Empty ones.
            pub(crate) fn new() -> Self {
                Self { $($field: Store::new(labelled),)+ }
            }

            /// The state of a child; `None` also for kinds beside the table.
            pub(crate) fn version(&self, kind: ObjectKind, namespace: &str, name: &str) -> Option<Version> {
                match kind {
                    $(ObjectKind::$kind => self.$field.version(namespace, name),)+
                    ObjectKind::Tier | ObjectKind::Pod => None,
                }
            }

            /// Children with the label of a model.
            pub(crate) fn of_model(&self, key: &ModelKey) -> Children {
                Children { $($field: super::owned(self.$field.of_model(key)),)+ }
            }

            /// Every store in turn.
            pub(crate) fn each(&self, visitor: &mut impl VisitStore) {
                $(visitor.store($plural, &self.$field);)+
            }
        }
    };
}
child_kinds!(declare);
