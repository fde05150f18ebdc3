//! Objects that have the name of one of our children and are not ours.
//!
//! Watches select by label, so they are in no store; a forced apply would take them over. Hence a child that no store
//! has is looked up before it is first applied. What belongs to somebody else is kept here, where the next plan sees it
//! under its name and says so, and is looked up again from time to time until it is gone.

use std::time::Duration;

use cadre_k8s_api::names::label;
use kube::{Client, ResourceExt, core::DynamicObject};
use tokio::time::Instant;

use super::kinds;
use crate::{kinds::Children, plan::ObjectKind};

/// How often strangers are looked up again.
pub(crate) const RECHECK: Duration = Duration::from_secs(10);

/// What stands in the way of a model's children.
#[derive(Clone, Debug, Default)]
pub(crate) struct Strangers(Vec<Stranger>);

#[derive(Clone, Debug)]
struct Stranger {
    kind: ObjectKind,
    object: DynamicObject,
    seen: Instant,
}

/// What a look-up found under a child's name.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// Nothing: it may be created.
    Free,
    /// A child whose owner reference or label is ours: the store will show it, or it lost its label.
    Ours {
        /// It has our label, so the store is merely behind.
        labelled: bool,
    },
    /// Somebody else's.
    Stranger(Box<DynamicObject>),
}

/// Looks up the name of a child.
pub(crate) async fn look_up(
    client: &Client,
    kind: ObjectKind,
    namespace: &str,
    name: &str,
    model: &str,
    model_uid: &str,
) -> Result<Found, kube::Error> {
    let Some(object) = kinds::api(client, kind, namespace).get_opt(name).await? else {
        return Ok(Found::Free);
    };
    let labelled = object.labels().get(label::MODEL).is_some_and(|of| of == model);
    let owned = object.owner_references().iter().any(|owner| owner.uid == model_uid);
    Ok(if labelled || owned { Found::Ours { labelled } } else { Found::Stranger(Box::new(object)) })
}

impl Strangers {
    /// Remembers one.
    pub(crate) fn add(&mut self, kind: ObjectKind, mut object: DynamicObject) {
        self.remove(kind, &object.name_any());
        object.managed_fields_mut().clear();
        self.0.push(Stranger { kind, object, seen: Instant::now() });
    }

    /// Nobody is there.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts them beside a model's children.
    pub(crate) fn add_to(&self, children: &mut Children) {
        self.0.iter().for_each(|stranger| children.add(stranger.kind, stranger.object.clone()));
    }

    /// Looks up again those that were not seen for a while, and drops the ones that are gone or have become ours.
    pub(crate) async fn recheck(
        &mut self,
        client: &Client,
        namespace: &str,
        model: &str,
        model_uid: &str,
    ) -> Result<(), kube::Error> {
        let due: Vec<_> =
            self.0.iter().filter(|stranger| stranger.seen.elapsed() >= RECHECK).cloned().collect();
        for Stranger { kind, object, .. } in due {
            let name = object.name_any();
            match look_up(client, kind, namespace, &name, model, model_uid).await? {
                Found::Stranger(object) => self.add(kind, *object),
                Found::Free | Found::Ours { .. } => self.remove(kind, &name),
            }
        }
        Ok(())
    }

    fn remove(&mut self, kind: ObjectKind, name: &str) {
        self.0.retain(|stranger| stranger.kind != kind || stranger.object.name_any() != name);
    }
}
