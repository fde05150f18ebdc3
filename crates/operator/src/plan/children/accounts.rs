//! ServiceAccounts: one per component, without a token and without a role. No process of a model speaks to
//! the Kubernetes API (ADR 8); the accounts are there so that policies can name them.

use k8s_openapi::api::core::v1::ServiceAccount;

use super::{
    super::{ObjectKind, component::Component, facts::Facts},
    Child, meta,
};

pub(super) fn account(facts: &Facts<'_>, component: Component) -> Option<Child> {
    let account = ServiceAccount {
        metadata: meta::metadata(facts, component.object_name(facts.name()), Some(component)),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    };
    Child::new(ObjectKind::ServiceAccount, None, &account)
}
