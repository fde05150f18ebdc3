//! What the watches show of one kind, indexed by model.
//!
//! A store is only ever changed in ways that a watch can repeat: one object applied, one deleted, or everything of a
//! scope replaced after a list. The last is what repairs a lost DELETE: whatever the list does not have is gone, and
//! the change is told like any other. Readers get shared objects and never wait for a watch.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use kube::{Resource, ResourceExt};

use super::queue::ModelKey;

/// Namespace (empty for kinds without one) and name.
type Id = (String, String);

/// The objects of one kind. Clones share them.
#[derive(Debug)]
pub(crate) struct Store<K> {
    state: Arc<RwLock<State<K>>>,
    /// The model that an object belongs to.
    model_of: fn(&K) -> Option<ModelKey>,
}

#[derive(Debug)]
struct State<K> {
    objects: BTreeMap<Id, Arc<K>>,
    by_model: HashMap<ModelKey, BTreeSet<Id>>,
}

/// What became of one object.
#[derive(Clone, Debug)]
pub(crate) struct Change<K> {
    /// As it was.
    pub(crate) old: Option<Arc<K>>,
    /// As it is; `None` if it is gone.
    pub(crate) new: Option<Arc<K>>,
}

/// Which state of an object a store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// `metadata.uid`
    pub(crate) uid: String,
    /// `metadata.resourceVersion`
    pub(crate) resource_version: String,
    /// Its deletion was asked for.
    pub(crate) deleting: bool,
}

impl<K> Clone for Store<K> {
    fn clone(&self) -> Self {
        Self { state: self.state.clone(), model_of: self.model_of }
    }
}

impl<K: Resource<DynamicType = ()>> Store<K> {
    /// An empty store.
    pub(crate) fn new(model_of: fn(&K) -> Option<ModelKey>) -> Self {
        let state = State { objects: BTreeMap::new(), by_model: HashMap::new() };
        Self { state: Arc::new(RwLock::new(state)), model_of }
    }

    /// The model that an object belongs to.
    pub(crate) fn model_of(&self, object: &K) -> Option<ModelKey> {
        (self.model_of)(object)
    }

    /// An object was made or changed.
    pub(crate) fn apply(&self, object: K) -> Change<K> {
        self.write().put(Arc::new(object), self.model_of)
    }

    /// An object is gone.
    pub(crate) fn delete(&self, object: &K) -> Change<K> {
        self.write().remove(&id(object), self.model_of)
    }

    /// These are all objects of the namespace (`None`: of the cluster). Unchanged ones are no change.
    pub(crate) fn replace(&self, namespace: Option<&str>, objects: Vec<K>) -> Vec<Change<K>> {
        let listed: BTreeSet<Id> = objects.iter().map(id).collect();
        let mut state = self.write();
        let in_scope = |id: &Id| namespace.is_none_or(|namespace| id.0 == namespace);
        let gone: Vec<Id> =
            state.objects.keys().filter(|id| in_scope(id) && !listed.contains(*id)).cloned().collect();
        let mut changes: Vec<_> = gone.iter().map(|id| state.remove(id, self.model_of)).collect();
        changes.extend(objects.into_iter().map(|object| state.put(Arc::new(object), self.model_of)));
        changes.retain(Change::is_one);
        changes
    }

    /// One object.
    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.read().objects.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// The state of one object.
    pub(crate) fn version(&self, namespace: &str, name: &str) -> Option<Version> {
        self.get(namespace, name).map(|object| version(&*object))
    }

    /// The objects of a model, by name.
    pub(crate) fn of_model(&self, model: &ModelKey) -> Vec<Arc<K>> {
        let state = self.read();
        let ids = state.by_model.get(model).into_iter().flatten();
        ids.filter_map(|id| state.objects.get(id)).cloned().collect()
    }

    /// The objects that pass, by namespace and name.
    pub(crate) fn matching(&self, mut passes: impl FnMut(&K) -> bool) -> Vec<Arc<K>> {
        self.read().objects.values().filter(|object| passes(object)).cloned().collect()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.read().objects.len()
    }

    fn read(&self) -> RwLockReadGuard<'_, State<K>> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State<K>> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Resource<DynamicType = ()>> State<K> {
    fn put(&mut self, object: Arc<K>, model_of: fn(&K) -> Option<ModelKey>) -> Change<K> {
        let id = id(&*object);
        let old = self.remove(&id, model_of).old;
        if let Some(model) = model_of(&object) {
            self.by_model.entry(model).or_default().insert(id.clone());
        }
        self.objects.insert(id, object.clone());
        Change { old, new: Some(object) }
    }

    fn remove(&mut self, id: &Id, model_of: fn(&K) -> Option<ModelKey>) -> Change<K> {
        let old = self.objects.remove(id);
        if let Some(model) = old.as_deref().and_then(model_of)
            && let Some(ids) = self.by_model.get_mut(&model)
        {
            ids.remove(id);
            if ids.is_empty() {
                self.by_model.remove(&model);
            }
        }
        Change { old, new: None }
    }
}

impl<K: Resource<DynamicType = ()>> Change<K> {
    /// Something did change: a list repeats what is known already.
    fn is_one(&self) -> bool {
        self.old.as_deref().map(version) != self.new.as_deref().map(version)
    }

    /// The object before and after.
    pub(crate) fn sides(&self) -> impl Iterator<Item = &K> {
        self.old.as_deref().into_iter().chain(self.new.as_deref())
    }
}

/// Uid, resource version and whether the object is on its way out.
pub(crate) fn version(object: &impl ResourceExt) -> Version {
    Version {
        uid: object.uid().unwrap_or_default(),
        resource_version: object.resource_version().unwrap_or_default(),
        deleting: object.meta().deletion_timestamp.is_some(),
    }
}

fn id<K: Resource<DynamicType = ()>>(object: &K) -> Id {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use cadre_k8s_api::names::label;
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;
    use crate::run::stores::labelled;

    fn object(namespace: &str, name: &str, model: &str, version: &str) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some(namespace.into());
        object.metadata.name = Some(name.into());
        object.metadata.uid = Some(format!("uid-{name}"));
        object.metadata.resource_version = Some(version.into());
        object.metadata.labels = Some([(label::MODEL.to_owned(), model.to_owned())].into());
        object
    }

    fn names(store: &Store<ConfigMap>, model: &str) -> Vec<String> {
        store.of_model(&ModelKey::new("ns", model)).iter().map(|object| object.name_any()).collect()
    }

    #[test]
    fn a_list_removes_what_it_does_not_have_and_tells_only_what_changed() {
        let store = Store::new(labelled);
        store.apply(object("ns", "kept", "m", "1"));
        store.apply(object("ns", "lost", "m", "2"));
        store.apply(object("other", "elsewhere", "m", "3"));
        let listed = vec![object("ns", "kept", "m", "1"), object("ns", "new", "m", "9")];
        let changes = store.replace(Some("ns"), listed);
        let told: Vec<_> = changes
            .iter()
            .map(|change| {
                let name = change.sides().next().map(ResourceExt::name_any).unwrap_or_default();
                (name, change.old.is_some(), change.new.is_some())
            })
            .collect();
        assert_eq!(told, [("lost".to_owned(), true, false), ("new".to_owned(), false, true)]);
        assert_eq!(names(&store, "m"), ["kept", "new"]);
        assert!(
            store.get("other", "elsewhere").is_some(),
            "another namespace's list is none of its business"
        );
        assert_eq!(store.replace(None, Vec::new()).len(), 3);
        assert_eq!(store.len(), 0);
    }

    #[test]
    fn an_object_moves_with_its_label() {
        let store = Store::new(labelled);
        store.apply(object("ns", "a", "first", "1"));
        let change = store.apply(object("ns", "a", "second", "2"));
        let models: Vec<_> = change.sides().filter_map(|object| store.model_of(object)).collect();
        assert_eq!(models, [ModelKey::new("ns", "first"), ModelKey::new("ns", "second")]);
        assert_eq!((names(&store, "first").len(), names(&store, "second").len()), (0, 1));
        store.delete(&object("ns", "a", "second", "3"));
        assert_eq!(names(&store, "second").len(), 0);
    }
}
