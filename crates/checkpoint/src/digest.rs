//! What bytes were read: a digest over tensors as they lie in the files.
//!
//! XXH3-64: some 10 GB/s on one core and more than any disk gives, so hashing what is read anyway costs a loading
//! process under a tenth of its packing. It tells files that differ, by damage, by a copy that was cut short or by a
//! change in place between the samples of [`crate::Checkpoint::model_hash`]; it is no guard against somebody who
//! searches for a collision.

use xxhash_rust::xxh3::Xxh3Default;

/// A digest that is being made.
#[derive(Default)]
pub struct Digest(Xxh3Default);

impl Digest {
    /// Takes bytes in. Their length goes first, so that two parts are not taken for one.
    pub(crate) fn part(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The digest of everything that was taken in.
    pub fn value(&self) -> u64 {
        self.0.digest()
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({:016x})", self.value())
    }
}
