//! The cluster secrets: what the processes of one model, and the operator, show each other.
//!
//! A model's secret is derived from the operator's key and the model's uid (HMAC-SHA256), so the operator knows it without reading
//! anything back: it needs the right to create Secrets in the models' namespaces, and none to read them. The key is a
//! Secret of the operator's own namespace, drawn by the first operator that finds none. Who deletes it changes every
//! model's secret, and so replaces every model's pods.
//!
//! The name of a model's Secret has a hash of its value: one that somebody else made under it is either the same or
//! leads to processes that refuse the operator, which is told (CoordinatorUnreachable). It is immutable, and goes with the
//! model by its owner reference. One that was deleted is made again when a pod cannot mount it.

use std::{fmt, time::Duration};

use cadre_k8s_api::{
    MoEModel,
    names::{self, CLUSTER_SECRET_KEY, FIELD_MANAGER, label},
};
use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{Api, Client, Resource, ResourceExt, api::PostParams};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

/// How often a Secret is made again without a sign that it is missing.
pub(crate) const REMAKE: Duration = Duration::from_secs(600);

/// Entry of the key's Secret.
const KEY: &str = "key";

/// Bytes of the key, and of every secret.
const BYTES: usize = 32;

/// The operator's key.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key([u8; BYTES]);

/// Where the key is, and the key once it was read.
pub(crate) struct Secrets {
    client: Client,
    namespace: String,
    name: String,
    key: OnceCell<Key>,
}

/// The secret of one model.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ClusterSecret {
    /// Name of the Secret that has it.
    pub(crate) name: String,
    value: String,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("Secret {namespace}/{name}: {source}")]
    Api { namespace: String, name: String, source: Box<kube::Error> },
    #[error(
        "Secret {namespace}/{name} has no entry `{KEY}` of {BYTES} bytes: delete it, and another one is drawn"
    )]
    Unusable { namespace: String, name: String },
    #[error("the machine gives no random bytes")]
    NoRandomness,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({}/{})", self.namespace, self.name)
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterSecret({})", self.name)
    }
}

impl ClusterSecret {
    /// What is shown.
    pub(crate) fn value(&self) -> &str {
        &self.value
    }
}

impl Secrets {
    /// With the key in this Secret, which need not exist.
    pub(crate) fn new(client: Client, namespace: String, name: String) -> Self {
        Self { client, namespace, name, key: OnceCell::new() }
    }

    /// The secret of a model. The key is read, or drawn, once.
    pub(crate) async fn of(&self, model: &MoEModel) -> Result<ClusterSecret, KeyError> {
        let key = self.key.get_or_try_init(|| self.key()).await?;
        Ok(key.secret(&model.name_any(), &model.uid().unwrap_or_default()))
    }

    async fn key(&self) -> Result<Key, KeyError> {
        let failed = |source| KeyError::Api {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            source: Box::new(source),
        };
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &self.namespace);
        if let Some(found) = secrets.get_opt(&self.name).await.map_err(failed)? {
            return self.read(&found);
        }
        let mut bytes = [0; BYTES];
        rustls::crypto::ring::default_provider()
            .secure_random
            .fill(&mut bytes)
            .map_err(|_| KeyError::NoRandomness)?;
        let drawn = Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some([(label::PART_OF.to_owned(), "cadre".to_owned())].into()),
                ..ObjectMeta::default()
            },
            immutable: Some(true),
            data: Some([(KEY.to_owned(), ByteString(bytes.to_vec()))].into()),
            ..Secret::default()
        };
        match secrets.create(&params(), &drawn).await {
            Ok(_) => {
                tracing::info!(
                    namespace = self.namespace,
                    name = self.name,
                    "Drew the key of the cluster secrets"
                );
                Ok(Key(bytes))
            }
            // Another operator was first; its key counts.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let found = secrets.get(&self.name).await.map_err(failed)?;
                self.read(&found)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn read(&self, found: &Secret) -> Result<Key, KeyError> {
        let bytes = found.data.as_ref().and_then(|data| data.get(KEY)).map(|bytes| bytes.0.as_slice());
        let key = bytes.and_then(|bytes| <[u8; BYTES]>::try_from(bytes).ok());
        key.map(Key)
            .ok_or_else(|| KeyError::Unusable { namespace: self.namespace.clone(), name: self.name.clone() })
    }

    /// Makes a model's Secret, if it is not there.
    pub(crate) async fn make(&self, model: &MoEModel, secret: &ClusterSecret) -> Result<(), kube::Error> {
        let namespace = model.namespace().unwrap_or_default();
        let labels =
            [(label::NAME, "cadre"), (label::MANAGED_BY, FIELD_MANAGER), (label::MODEL, &model.name_any())];
        let object = Secret {
            metadata: ObjectMeta {
                name: Some(secret.name.clone()),
                labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
                owner_references: Some(vec![OwnerReference {
                    api_version: MoEModel::api_version(&()).into_owned(),
                    kind: MoEModel::kind(&()).into_owned(),
                    name: model.name_any(),
                    uid: model.uid().unwrap_or_default(),
                    controller: Some(true),
                    block_owner_deletion: Some(true),
                }]),
                ..ObjectMeta::default()
            },
            immutable: Some(true),
            data: Some(
                [(CLUSTER_SECRET_KEY.to_owned(), ByteString(secret.value.clone().into_bytes()))].into(),
            ),
            ..Secret::default()
        };
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &namespace);
        match secrets.create(&params(), &object).await {
            Ok(_) => {
                tracing::info!(%namespace, name = secret.name, "Made the cluster secret of a model");
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

impl Key {
    fn secret(&self, model: &str, uid: &str) -> ClusterSecret {
        let value = hex(&hmac(&self.0, uid.as_bytes()));
        let name = names::cluster_secret(model, &hex(&Sha256::digest(&value))[..10]);
        ClusterSecret { name, value }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// HMAC-SHA256 (RFC 2104) with a key shorter than a block.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    const BLOCK: usize = 64;
    let pad = |with: u8| {
        let mut block = [with; BLOCK];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests;
